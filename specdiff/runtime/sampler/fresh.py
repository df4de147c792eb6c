"""Fresh: the noise that a scheduler draws at each step along a flow, found by a copy of it.

Of a step x' = a x + b p + s z the size s is known: it is all that zeros become. So a step is
explained where what nothing else explains has that size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EVEN = 2e-3
"""How far a flow's sigma may be from its time, which may be rounded to an integer."""
ALL = 0.95
"""Share of the noise at the next time from which on it is drawn anew: forecasts of what is under it
are then worse than fewer steps (LCM, stochastic Euler)."""
SIDE = 64
LEAST, MOST = 0.4, 1.2
"""What is left of a step relative to the noise that was drawn. The least touched places count,
which have about three quarters of it."""


@dataclass(frozen=True, eq=False)
class Fresh:
    """Along a whole generation of E evaluations."""

    levels: tuple[float, ...]
    """sigma of x = (1 - sigma) x0 + sigma noise at each evaluation and at the end, E + 1."""
    drawn: tuple[float, ...]
    """s of each of the E steps."""

    @property
    def anew(self) -> bool:
        """Whether all noise is drawn anew at each step."""
        steps = zip(self.drawn, self.levels[1:], strict=True)
        return all(drawn >= ALL * level for drawn, level in steps if level > EVEN)

    def explains(self, step: int, left: float) -> bool:
        """Whether what nothing explains of a step, root mean square, is noise of its size."""
        return left <= MOST * self.drawn[step] and left >= LEAST * self.drawn[step]


def fresh_noise(own: Any, timesteps: Tensor, levels: Sequence[float]) -> Fresh | None:
    """What a scheduler that may be stepped at will draws; None where it draws none.

    Args:
        own: a copy, about to take these steps, all on the host.
        timesteps: [E].
        levels: as of `Fresh`.
    """
    zeros, drawn = torch.zeros(1, 1, SIDE, SIDE, device="cpu"), []
    with torch.random.fork_rng(devices=[]):
        for time in timesteps:
            found = own.step(zeros, time, zeros, return_dict=False)[0]
            drawn.append(float(found.square().mean().sqrt()))
    return Fresh(tuple(levels), tuple(drawn)) if any(drawn) else None


def flow_levels(scheduler: Any, times: Sequence[float], unit: float) -> tuple[float, ...] | None:
    """The sigma at times and at the end, if the scheduler goes along a flow."""
    sigmas = getattr(scheduler, "sigmas", None)
    if not isinstance(sigmas, Tensor) or len(sigmas) < len(times) + 1:
        return None
    levels = tuple(float(sigma) for sigma in sigmas[-len(times) - 1 :].tolist())
    pairs = zip(levels, times, strict=False)
    return levels if all(abs(level - time / unit) <= EVEN for level, time in pairs) else None
