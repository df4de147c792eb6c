"""Self-speculation: jump to a few later times, look which tokens will matter, come back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdiff.program import Programs, Signature
from specdiff.runtime.sampler.sampler_fit import Prediction
from specdiff.runtime.sampler.timeline import end_of
from specdiff.runtime.streams.stream import Stream
from specdiff.runtime.tokens.importance import per_sample

# Model times that pipelines make of scheduler times, as (scale, offset): T, T/1000, 1000 T, 1 - T,
# 1 - T/1000, 1000 - T, 1000 - 1000 T.
TIME_MAPS = ((1, 0), (1e-3, 0), (1e3, 0), (-1, 1), (-1e-3, 1), (-1, 1000), (-1e3, 1000))


def landings(times: Sequence[float], steps: int, given: Sequence[float] | None) -> list[float]:
    """Where `steps` speculative evaluations land, the first (the run's own first) left out.

    Args:
        times: of the evaluations so far, at least two distinct ones.
        steps: speculative evaluations m.
        given: all times of the run, if known: landings at equal index spacing. Otherwise equal
            spacing in sigma, from the first time to the end of the flow.

    Returns:
        At most m - 1 times, soonest first, those already reached left out.
    """
    direction = 1 if times[-1] > times[0] else -1
    if given is not None:
        places = [given[j * len(given) // steps] for j in range(1, steps)]
    else:
        end = end_of(times)
        places = [times[0] + (end - times[0]) * j / steps for j in range(1, steps)]
    return [place for place in places if (place - times[-1]) * direction > 0]


def model_time(landing: float, given: tuple[float, float], seen: tuple[Tensor, Tensor]) -> Tensor:
    """What the model's time input is at a scheduler's time, decided on the device.

    Args:
        landing: the scheduler's time.
        given: two times of the scheduler.
        seen: the time inputs at these two, float32 scalars.

    Returns:
        float32 [1].
    """
    # made on the host and copied without waiting: a tensor made on a device waits for it
    maps = torch.tensor(TIME_MAPS, dtype=torch.float32, device="cpu")
    maps = maps.to(seen[0].device, non_blocking=True)
    scale, offset = maps.unbind(1)
    misses = sum(
        (scale * time + offset - value).abs() for time, value in zip(given, seen, strict=True)
    )
    assert isinstance(misses, Tensor)
    best = misses.argmin().reshape(1)
    return (scale * landing + offset).index_select(0, best)


def speculate(
    programs: Programs,
    scratch: Sequence[Tensor],
    inputs: Sequence[object],
    stream: Stream,
    prediction: Prediction,
    places: Sequence[tuple[float, float | Tensor]],
    shared: bool,
) -> list[tuple[float, Tensor]]:
    """Evaluate the model at later times and keep the importance; nothing else changes.

    Args:
        programs: of the graph.
        scratch: caches that nobody reads.
        inputs: the flat inputs of the evaluation just made.
        stream: holds that evaluation's latents and predictions.
        prediction: how the sampler moves the latent.
        places: landings, each in the stream's own time and as the model's input takes it.
        shared: the batch is the two halves of classifier-free guidance.
    """
    signature = programs.signature
    scored = []
    for landing, value in places:
        latents = [
            prediction.jump(latent, ways, stream.times[-1], landing)
            for latent, *ways in zip(stream.latents, *stream.predictions, strict=True)
        ]
        evaluation = programs.dense(_moved(signature, inputs, latents, value), scratch)
        assert evaluation.importance is not None  # a dense run measures it
        importance = per_sample(evaluation.importance, shared)
        trusted = prediction.trusted.to(importance.device, non_blocking=True)
        scored.append((landing, torch.where(trusted, importance, 1.0)))
    return scored


def _moved(
    signature: Signature, inputs: Sequence[object], latents: Sequence[Tensor], time: float | Tensor
) -> list[object]:
    """The inputs with time and the moving parts of the latents replaced, strides kept."""
    assert signature.time is not None
    moved = list(inputs)
    for pair, latent in zip(signature.denoised, latents, strict=True):
        old = inputs[pair.latent]
        assert isinstance(old, Tensor)
        new = latent
        if pair.shared is not None:
            new = old.clone()
            pair.part(new).copy_(latent)
        moved[pair.latent] = _strided_as(old, new)
    old_time = inputs[signature.time]
    if isinstance(old_time, Tensor):
        value = torch.as_tensor(time, device=old_time.device).to(old_time.dtype).reshape(())
        # Pipelines expand one scalar over the batch: an axis of stride 0 stays one.
        extent = 1 + sum(
            (n - 1) * s for n, s in zip(old_time.shape, old_time.stride(), strict=True)
        )
        moved[signature.time] = value.repeat(extent).as_strided(old_time.shape, old_time.stride())
    else:
        moved[signature.time] = float(time)
    return moved


def _strided_as(old: Tensor, new: Tensor) -> Tensor:
    if new.stride() == old.stride() or 0 in old.stride():
        return new
    return torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=old.device).copy_(
        new
    )
