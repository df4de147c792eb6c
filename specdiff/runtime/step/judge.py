"""Judge: what forecasts would have missed of what was computed, and how far they are trusted."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from specdiff.runtime.sampler.guides import Rows, share, shares_by_scale, shares_missed
from specdiff.runtime.sampler.scale import read_as_called
from specdiff.runtime.step.call import Call
from specdiff.runtime.streams.stream import Stream
from specdiff.runtime.streams.trail import CHECK_LAG
from specdiff.runtime.tokens.trust import Miss


def trusted(call: Call) -> bool:
    """Whether a forecast may go as far as to this evaluation; of a quality's plan alone."""
    span = span_to_judge(call)
    lag = 1 if call.reading is not None else CHECK_LAG  # else nothing may wait for the device
    return not span or span <= call.stream.trust.reach(call.index, lag, call.settings.trusted)


def span_to_judge(call: Call) -> float:
    """Time since the last computed prediction; 0 where forecasts are not judged by what they miss.

    A plan that is given is followed as it is; fresh noise moves predictions, but not what is
    forecast of them.
    """
    computed = call.stream.history.computed
    if not call.settings.trusted or call.schedule.selects or call.fresh is not None or not computed:
        return 0.0
    before, now = computed[0].times, call.clock
    return 0.0 if isinstance(before, Tensor) or isinstance(now, Tensor) else abs(now - before)


def note_miss(call: Call, forecast: Tensor, computed: Tensor) -> None:
    """Note how much of what moves the latent a forecast [B, N, C] would have missed.

    Where several calls guide one latent, the latest of an evaluation judges them all alike, so
    that they keep step.
    """
    trust, scale = call.stream.trust, call.settings.guidance_scale
    learned = call.stream.fit.scale.value is not None  # from the first steps: it may change
    miss = Miss(call.index, span_to_judge(call), forecast - computed, computed)
    if scale is not None and not learned:
        # Which half comes first is not known here: the way that trusts less.
        trust.note(miss.index, miss.span, shares_by_scale(miss.missed, computed, scale).max())
        return
    trust.latest = miss
    latents = list(call.programs.signature.moving_parts(call.inputs))
    own = _rows(call.stream, miss, latents, ago=0)
    if own is None:
        trust.note(miss.index, miss.span, share(miss.missed, computed).max())
        return
    found = {each: _rows(each, each.trust.latest, each.latents, ago=1) for each in _beside(call)}
    others = {each: rows for each, rows in found.items() if rows is not None and own.fits(rows)}
    shares = shares_missed(own.after(list(others.values())))
    counts = [len(each.computed) for each in (*others.values(), own)]
    for stream, part in zip((*others, call.stream), shares.split(counts), strict=True):
        latest = stream.trust.latest
        assert latest is not None  # of this evaluation
        stream.trust.note(latest.index, latest.span, part.max())


def _beside(call: Call) -> list[Stream]:
    """Streams that were computed at this evaluation already, and at all the times before it."""
    times = [*call.stream.times, call.time]
    return [
        each
        for each in call.owner.streams()
        if each.times == times and each.trust.latest and each.trust.latest.index == call.index
    ]


def _rows(stream: Stream, miss: Miss | None, latents: Sequence[Tensor], ago: int) -> Rows | None:
    """Of a stream whose evaluation before this one is so many ago; None if none can be read."""
    seen, scale = stream.trail.seen[ago : ago + 1], stream.fit.scale.value
    if scale is not None:
        seen = tuple(read_as_called(each, scale) for each in seen)
    if miss is None or not seen or len(seen[0].predictions) != 1:
        return None
    return Rows.of(latents, seen[0], miss.missed, miss.computed)
