"""What the sampler does with a velocity, inferred from two evaluations of one trajectory.

For an Euler flow sampler x1 = x0 + (sigma1 - sigma0) v0, so the step in x is the velocity times a
number whose sign and size tell what time means: sigma or 1 - sigma, in units of 1 or 1000.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

POOR_FIT = 0.5
"""Relative residual of the Euler fit from which on the sampler is taken not to be an Euler flow.

Two unrelated latents give 0.7 or more, Euler in bf16 a few hundredths, and separate CFG calls,
of which each sees only its own half of the guided velocity, up to about 0.5.
"""
RATE_TOLERANCE = 3.0
"""Factor by which a fitted step may differ from the step in time, which bf16 rounds."""


def time_unit(times: Iterable[float]) -> Literal[1, 1000]:
    """The time at which sigma (or 1 - sigma) is 1, from its size."""
    return 1000 if max(abs(time) for time in times) > 1.5 else 1


def guided(velocity: Tensor, scale: float | None) -> Tensor:
    """A copy of the velocity that moves the latent, float32, guided where a scale is given.

    Args:
        velocity: the model's output; with a scale, unconditional half first.
        scale: g in u + g (c - u), or None for no guidance in the batch.
    """
    if scale is None:
        return velocity.to(torch.float32, copy=True)
    unconditional, conditional = velocity.float().chunk(2)
    return torch.cat([torch.lerp(unconditional, conditional, scale)] * 2)


def euler_fit(
    latents: Sequence[Tensor], previous: Sequence[Tensor], velocities: Sequence[Tensor]
) -> Tensor:
    """Least squares of the latents' step on the previous velocities.

    Returns:
        float32 [3], on the device: |step| / |previous latent|, the factor a of step = a v, and the
        relative residual |step - a v| / |step|.
    """
    before, velocity = _flat(previous), _flat(velocities)
    step = _flat(latents) - before
    tiny = torch.finfo(torch.float32).tiny
    factor = (step * velocity).sum() / velocity.square().sum().clamp_min(tiny)
    length = torch.linalg.vector_norm(step).clamp_min(tiny)
    residual = torch.linalg.vector_norm(step - factor * velocity) / length
    change = length / torch.linalg.vector_norm(before).clamp_min(tiny)
    # A latent that did not move at all reads as exactly 0, not as the smallest float.
    return torch.stack([torch.where(length > tiny, change, 0.0), factor, residual])


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """All entries as one float32 vector; a view where there is one contiguous tensor."""
    flat = [tensor.float().flatten() for tensor in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


@dataclass(frozen=True)
class Reading:
    """The host's view of one evaluation, fetched from the device in one transfer."""

    time: float
    same_time: bool
    """Whether all batch rows have this time."""
    finite: bool
    """Whether the latent has no NaN and no infinity."""
    change: float = 0.0
    factor: float = 0.0
    residual: float = 0.0


def read(
    time: object,
    latent: Tensor,
    moved: Sequence[Tensor],
    previous: Sequence[Tensor],
    velocities: Sequence[Tensor],
) -> Reading:
    """Read time and latent of an evaluation, with the Euler fit if there is a previous one.

    `moved` are the parts of the latents that the velocities move.
    """
    times = torch.as_tensor(time, device=latent.device).float().flatten()
    parts = [times.min(), times.max(), torch.linalg.vector_norm(latent.float())]
    if previous:
        parts.extend(euler_fit(moved, previous, velocities))
    low, high, norm, *fit = torch.stack(parts).tolist()
    return Reading(low, low == high, math.isfinite(norm), *fit)


@dataclass(frozen=True)
class Prediction:
    """How far the latent moves: d latent = rate * d time * velocity."""

    rate: float | Tensor
    """1 / unit, negative where the model's output points against time; a scalar."""
    trusted: bool | Tensor
    """Whether the trajectory fits an Euler flow."""

    @classmethod
    def infer(cls, reading: Reading, step: float, unit: int) -> Prediction:
        """Decide on the host; `step` is the change of time that the fit belongs to."""
        ratio = abs(reading.factor * unit / step)
        trusted = reading.residual < POOR_FIT and 1 / RATE_TOLERANCE < ratio < RATE_TOLERANCE
        return cls(math.copysign(1 / unit, reading.factor * step), trusted)

    @classmethod
    def measure(cls, fit: Tensor, step: float) -> Prediction:
        """Keep rate and verdict on the device; `step` is exact, so no unit need be known."""
        return cls(fit[1] / step, fit[2] < POOR_FIT)

    def jump(self, latent: Tensor, velocity: Tensor, duration: float) -> Tensor:
        """One Euler step of `duration` in time, in the latent's dtype."""
        return (latent.float() + self.rate * duration * velocity).to(latent.dtype)
