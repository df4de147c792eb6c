"""Look-ahead: infer how the sampler moves the latent, and speculate once that is known."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from specdiff.runtime.sampler.displacement import Displacement, Ways, guided
from specdiff.runtime.sampler.remains import Seen, precision_of
from specdiff.runtime.sampler.sampler_fit import Prediction
from specdiff.runtime.sampler.timeline import time_unit
from specdiff.runtime.step.call import Call
from specdiff.runtime.step.speculation import landings, model_time, speculate
from specdiff.runtime.streams.keys import is_plain

logger = logging.getLogger(__name__)

NO_FIT = (
    "no speculation or correction: the sampler's steps fit neither a flow nor DDIM on a usual noise"
    " schedule"
    " (if batches hold both halves of classifier-free guidance, give guidance_scale;"
    " for another schedule, give its alphas_cumprod)"
)


def look_ahead(call: Call, outputs: Sequence[object], tokens: Tensor) -> None:
    """Keep what the next evaluation's fit needs, and speculate once time has moved.

    Args:
        call: of an evaluation that was made.
        outputs: what the tail returned, which its next run may overwrite.
        tokens: what it was made from, which nobody does.
    """
    stream, times = call.stream, call.stream.times
    watched = call.corrects or call.has_weights or call.integrates
    followed = watched or (call.schedule.forecasts and call.counted is not None)
    pending = call.wants_future or (followed and stream.fit.sampler is None)
    before = stream.latents, stream.predictions, stream.trail.model_time
    if pending or call.schedule.forecasts or call.integrates or call.reading is not None:
        signature = call.programs.signature
        latents = tuple(p.clone() for p in signature.moving_parts(call.inputs))
        scale = call.settings.guidance_scale
        predicted = [_kept(guided(p, scale), p, tokens) for p in signature.moved_by(outputs)]
        predictions = tuple(zip(*predicted, strict=True))
        seen, time = Seen(call.time, latents, predictions), _model_time(call) if pending else None
        stream.trail.keep(seen, time)
    if pending and len(times) > 1 and times[-1] != times[-2]:
        _infer(call, *before)


def _kept(ways: Sequence[Tensor], prediction: Tensor, tokens: Tensor) -> list[Tensor]:
    """Ways to read a prediction, none of which is overwritten: copies, but of views of `tokens`."""
    if _shares(prediction, tokens):
        return list(ways)
    return [way.clone() if _shares(way, prediction) else way for way in ways]


def _shares(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors have their numbers in the same memory."""
    if not is_plain(tensor) or not is_plain(other):
        return tensor is other
    return tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _model_time(call: Call) -> Tensor:
    index = call.programs.signature.time
    time = call.inputs[index] if index is not None else call.time
    value = torch.as_tensor(time).float().flatten()[0].clone()
    return value.to(call.latent.device, non_blocking=True)


def _infer(call: Call, latents: tuple[Tensor, ...], predictions: Ways, time: Tensor | None) -> None:
    """Infer the sampler from the previous evaluation, given by its parts; look ahead."""
    stream = call.stream
    if not latents or time is None or stream.trail.model_time is None:
        return
    if len(predictions) != len(stream.predictions):
        return  # guidance was set or unset in between
    sampler = _inferred(call, latents, predictions)
    fits = call.reading is None or sampler.trusted  # else it is not known here
    if not fits and call.may_learn_scale:
        return  # the scale of guidance may be what is missing
    stream.fit.learn(sampler, len(stream.times))
    if not fits and not call.has_weights:
        call.state.say(logger, NO_FIT)
    elif call.wants_future:
        stream.selected.looked_ahead = True
        _speculate(call, sampler, time)


def _speculate(call: Call, prediction: Prediction, time: Tensor) -> None:
    """Look ahead; `time` was the previous evaluation's time input."""
    stream, times = call.stream, call.stream.times
    landed = landings(times, call.settings.plan.lookahead, call.given)
    places = [(landing, _input_at(call, landing, time)) for landing in landed]
    scratch = call.pool.scratch()
    stream.selected.speculative = speculate(
        call.programs, scratch, call.inputs, stream, prediction, places, call.shared
    )
    call.state.counters.speculative += len(places)
    call.keep(speculative=len(places))
    tokens = call.programs.signature.batch * call.schedule.tokens
    call.state.counters.tokens_computed += len(places) * tokens


def _inferred(call: Call, latents: tuple[Tensor, ...], predictions: Ways) -> Prediction:
    """What the sampler did since the previous evaluation, given by its parts."""
    stream, (start, end) = call.stream, call.stream.times[-2:]
    seen = call.seen
    if seen is None:
        seen = Displacement.of(stream.latents, latents, predictions)
    unit, exact = time_unit(call.given or stream.times), call.counted is not None
    return Prediction.infer(
        seen,
        call.candidates,
        start,
        end,
        unit,
        exact=exact,
        precision=precision_of(latents),
    )


def _input_at(call: Call, landing: float, previous: Tensor) -> float | Tensor:
    """The time input at a landing; `previous` was that of the previous evaluation."""
    start, end = call.stream.times[-2:]
    if call.reading is not None or call.stream.trail.model_time is None:
        return landing
    return model_time(landing, (start, end), (previous, call.stream.trail.model_time))
