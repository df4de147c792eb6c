"""Corrector: when the latent may be corrected, and with what.

By the sampler's weights where a scheduler at hand tells them, whatever its order. Else by what the
sampler's steps showed, and only where they are of first order: a solver of higher order uses
earlier predictions again, what was put on top of them too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from specdiff.runtime.sampler.displacement import Displacement
from specdiff.runtime.sampler.known_step import FIRST_ORDER
from specdiff.runtime.sampler.timeline import next_time
from specdiff.runtime.step.call import Call
from specdiff.runtime.step.scheduled import GIVE_SCHEDULER
from specdiff.runtime.tokens.correction import Correction, on_top
from specdiff.runtime.tokens.history import ComputedOutput

logger = logging.getLogger(__name__)

REUSES = (
    "what forecasts cost is not made good: the sampler uses earlier predictions again, as multistep"
    f" solvers do, or is none that is known (with it, {GIVE_SCHEDULER}, their weights are)"
)
ONE_HALF = (
    "what forecasts cost is not made good: a call explains only a part of the sampler's steps, as"
    f" where guidance is in calls of its own (with it, {GIVE_SCHEDULER}, their weights are)"
)
PROOF = 4.0
"""Change of a prediction, as a multiple of what a first-order step may miss, that shows in the step
of a sampler that uses the one before it again: half of it in Adams-Bashforth's."""


def settle(call: Call) -> None:
    """Note what the sampler's step since the previous evaluation has made of its forecasts."""
    stream = call.stream
    if not call.corrects:
        stream.fit.correction = None  # what it knows grows old while nothing keeps it up
    if stream.fit.correction is None or stream.fit.sampler is None:
        return
    bends = stream.trail.bends if call.seen is None else not is_of_first_order(call, call.seen)
    if bends:
        stream.fit.correction, stream.fit.first_order = None, False
        if call.reading is None or stream.fit.sampler.trusted:  # else there is another message
            call.state.say(logger, REUSES)
    else:
        kept, moved = stream.fit.sampler.step(stream.times[-1], call.time, call.seen)
        if call.reading is None and isinstance(moved, float) and not moved:
            call.state.say(logger, ONE_HALF)
        stream.fit.correction.settle(kept, call.at_pace(moved))
        note_proof(call)


def note_proof(call: Call) -> None:
    """Note whether the step, which was of first order, could have shown another."""
    if call.reading is not None and (joint := call.reading.joint):
        call.stream.fit.proven |= joint.news.item() > PROOF * _allowed(call, joint.moved)


def is_of_first_order(call: Call, seen: Displacement) -> bool:
    """Whether the last step follows from the last prediction alone, as far as rounding shows."""
    allowed, start = _allowed(call, seen), call.stream.times[-1]
    chosen = call.stream.fit.sampler.chosen if call.stream.fit.sampler is not None else None
    # The usual case, in a few numbers of the host.
    if chosen and seen.misfit(*chosen, start, call.time) <= allowed:
        return True
    return seen.residual(call.candidates, start, call.time) <= allowed


def _allowed(call: Call, seen: Displacement) -> float:
    """What a first-order step may miss, relative to its length."""
    assert call.reading is not None  # or nothing would have been seen
    return FIRST_ORDER + call.reading.rounding(seen)


def corrected(
    call: Call, before: Sequence[ComputedOutput], tokens: Tensor, *, computed: bool
) -> Tensor:
    """`tokens`, and on top of those just computed what their forecasts had cost the latent."""
    stream, newest = call.stream, call.stream.history.computed[0]
    if stream.fit.correction is None:
        stream.fit.correction = Correction.none(newest)
    elif stream.fit.sampler is not None and computed:
        older = before[1] if len(before) > 1 else None
        missing = stream.fit.correction.collect(before[0], older, newest)
        due = next_time([*stream.times, call.time], call.given)
        kept, moved = stream.fit.sampler.step(call.time, due)
        more = on_top(missing, kept, call.at_pace(moved))
        if not doubted(call):  # else it stays missing, to be put on top later
            tokens = (tokens.float() + more).to(tokens.dtype)
    stream.fit.correction.hand_out(newest, tokens, call.clock)
    return tokens


def filled_up(call: Call, tokens: Tensor, *, computed: bool) -> Tensor:
    """`tokens`, and on top what brings the next latent to where it should be, by known weights."""
    run, fit = call.stream.run, call.stream.fit
    assert run is not None and not isinstance(call.clock, Tensor)  # it has weights
    index = run.first + len(call.stream.times)
    if computed:
        return fit.shortfall.computed(0, index, call.stream.history.computed, run.weights)
    return fit.shortfall.forecast(0, index, call.clock, tokens, run.weights)


def doubted(call: Call) -> bool:
    """Whether the sampler may be one that uses earlier predictions again, for all that is seen.

    With two predictions a step is explained more easily, and a wrong correction costs more than
    the wait: nothing is put on top until a step could have shown another order.
    """
    paired = call.reading is not None and call.reading.joint is not None
    return paired and not call.stream.fit.proven
