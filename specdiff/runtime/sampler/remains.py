"""Remains: the part of a sampler's step that nothing seen before explains.

A sampler that adds nothing of its own moves the latent by a sum of what it has seen: latents and
predictions of the last few evaluations, whatever its order (Euler, Heun, DPM-Solver++, UniPC, DEIS,
Runge-Kutta). So the step lies in their span, row by row, up to rounding. Fresh noise does not, nor
does a latent that came from elsewhere.

A caller may replace part of the latent, as in inpainting. Noise is everywhere: the remains are
those of the least touched places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdiff.runtime.sampler.displacement import wide

DEPTH = 4
"""Evaluations that a step may follow from: UniPC of order three and the classical Runge-Kutta
method use as many."""
PLACE = 16
"""Numbers, next to each other in memory, that count as one place."""
TOUCHED = 0.9
"""Share of places that a caller may have replaced. Noise is seen in the others."""
UNEXPLAINED = 0.1
"""Remains, relative to the step, from which on a step is unexplained. On the demo model noise of
any sampler leaves 0.3 to 0.75, and no sampler without noise leaves 0.001."""
EXPLAINED = 0.02
"""Remains up to which a latent is that of a trajectory whose conditions have changed."""
ROUNDED = 0.5
"""Remains that rounding of two latents may leave, in units of their precision."""
RIDGE = 1e-13
"""Added to the diagonal of inner products, relative to it: latents in a row are nearly parallel."""


class Awaited:
    """Numbers on their way to the host: reading them waits for nothing that was queued later."""

    def __init__(self, value: Tensor) -> None:
        self._arrived: torch.Event | None = None
        if value.device.type == "cpu":
            self._value: Any = value.tolist()
        else:
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._arrived = torch.Event(value.device)
            self._arrived.record()

    def read(self) -> Any:
        """A number, or lists of them as of `Tensor.tolist`."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._value, self._arrived = self._value.tolist(), None
        return self._value


@dataclass(frozen=True)
class Seen:
    """What an evaluation saw and gave, as the sampler may use it."""

    time: float
    latents: tuple[Tensor, ...]
    """What is denoised, each [B, ...]."""
    predictions: tuple[tuple[Tensor, ...], ...]
    """For the latents, float32, once for each way to read guidance from the batch."""


def remains(
    latents: Sequence[Tensor], trail: Sequence[Seen], others: Sequence[Seen], batch: int
) -> Tensor:
    """The share of the step to `latents` that nothing explains, of the worst row; on the device.

    Args:
        latents: of the present evaluation.
        trail: of its trajectory, the latest first; at least one.
        others: evaluations at the same times by which the same latent may have been guided.
        batch: B.

    Returns:
        float64 scalar: 0 where all is explained or nothing moved, at most about 1. Less what
        rounding of the latents may leave.
    """
    vectors = [rows_of(latents, batch), *_span(trail, others, batch)]
    rows = torch.stack(vectors).to(wide(vectors[0].device))
    now, before = rows[0], rows[1]
    step = now - before
    # the tokens of a reference picture never move, and what is predicted for them moves nothing
    moved = step != 0
    span = rows[1:].transpose(0, 1) * moved.unsqueeze(1)
    weights = weights_of(span, step, RIDGE)
    left = step - (weights.unsqueeze(1) @ span).squeeze(1)
    count = moved.sum(1)
    length, size_before = _level(step, count), _level(before * moved, count)
    rounding = ROUNDED * precision_of(latents) * size_before
    tiny = torch.finfo(length.dtype).tiny
    unexplained = (_least(left, moved) - rounding) / length.clamp_min(tiny)
    worst: Tensor = unexplained.clamp_min(0).max()
    return worst


def weights_of(span: Tensor, step: Tensor, ridge: float) -> Tensor:
    """[R, V]: by how much of each of its V vectors, [R, V, n], each row's step [R, n] is made.

    Args:
        span: vectors.
        step: what they are to make.
        ridge: added to the diagonal of the vectors' inner products, relative to it.
    """
    inner = span @ span.mT
    size = inner.diagonal(dim1=1, dim2=2)
    scale = size.clamp_min(torch.finfo(size.dtype).tiny).rsqrt()
    inner = inner * scale.unsqueeze(1) * scale.unsqueeze(2)
    inner.diagonal(dim1=1, dim2=2).add_(ridge)
    along = (span @ step.unsqueeze(-1)).squeeze(-1) * scale
    # with checks it would wait for the device
    weights: Tensor = torch.linalg.solve_ex(inner, along.unsqueeze(-1))[0].squeeze(-1)
    return weights * scale


def _span(trail: Sequence[Seen], others: Sequence[Seen], batch: int) -> list[Tensor]:
    """Vectors [B, n] that a step may be a sum of."""
    vectors = [rows_of(seen.latents, batch) for seen in trail]
    for seen in (*trail, *others):
        for prediction in seen.predictions:
            rows = rows_of(prediction, batch)
            vectors.append(rows)
            if len(seen.predictions) == 1:
                vectors += [rows.roll(shift, 0) for shift in shifts(len(rows))]
    return vectors


def shifts(batch: int) -> list[int]:
    """By how many rows to look for others that may guide a row, by a scale that nobody told.

    Halves of a batch guide each other, or thirds (InstructPix2Pix), or neighbours in pairs.
    """
    parts = [count for count in (2, 3) if batch % count == 0]
    found = {batch // count * i for count in parts for i in range(1, count)}
    return sorted(found if batch % 2 else found | {1, batch - 1})


def _level(rows: Tensor, count: Tensor) -> Tensor:
    """[B]: root mean square of `count` [B] numbers of rows [B, n], where the others are zero."""
    return (rows.square().sum(1) / count.clamp_min(1)).sqrt()


def _least(left: Tensor, moved: Tensor) -> Tensor:
    """[B]: root mean square of `left` [B, n] in the places touched least of those that moved."""
    width = min(PLACE, left.shape[1])
    places, moving = (
        rows[:, : rows.shape[1] // width * width].unflatten(1, (-1, width))
        for rows in (left, moved)
    )
    touched = moving.any(2)
    levels = places.square().mean(2).masked_fill(~touched, torch.inf).sort(1).values
    rank = (touched.sum(1) * (1 - TOUCHED)).round().long().clamp_min(1) - 1
    least: Tensor = levels.gather(1, rank.unsqueeze(1)).squeeze(1).sqrt()
    return least.masked_fill(~touched.any(1), 0)


def rows_of(tensors: Sequence[Tensor], batch: int) -> Tensor:
    """[B, n]: all numbers of each sample; [1, n] if a tensor has no batch."""
    rows = batch if all(len(t) == batch for t in tensors) else 1
    flat = [tensor.reshape(rows, -1) for tensor in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)


def precision_of(latents: Sequence[Tensor]) -> float:
    """Relative rounding of the coarsest of them."""
    return max(torch.finfo(latent.dtype).eps for latent in latents)
