"""What is fetched from the device for one evaluation, in one transfer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from specdiff.runtime.sampler.guidance_pair import Joint
from specdiff.runtime.sampler.noise import Process
from specdiff.runtime.sampler.sampler_fit import POOR_FIT, Displacement


@dataclass(frozen=True)
class Reading:
    """The host's view of one evaluation."""

    time: float
    same_time: bool
    """Whether all batch rows have this time."""
    finite: bool
    """Whether the latent has no NaN and no infinity."""
    precision: float = 0.0
    """Relative rounding of the latent."""
    moved: Displacement | None = None
    """How the sampler came here, if there is a previous evaluation; on the host."""
    joint: Joint | None = None
    """The same by both halves of guidance, if another stream has the other one; on the host."""

    @cached_property
    def change(self) -> float:
        """Relative change of the latent since the previous evaluation; 0.0 if there is none."""
        return self.moved.change.item() if self.moved is not None else 0.0

    def rounding(self, seen: Displacement) -> float:
        """What rounding of the latent may add to a step, relative to the step's length."""
        return 2 * self.precision / max(seen.change.item(), 1e-6)

    def is_strange(self, candidates: Sequence[Process], start: float) -> bool:
        """Whether no candidate, nor rounding, explains how the latent came here since `start`."""
        seen = self.joint.moved if self.joint is not None else self.moved
        if seen is None or not self.change:
            return False
        return seen.residual(candidates, start, self.time) > POOR_FIT + self.rounding(seen)


def read(
    time: object, latent: Tensor, moved: Displacement | None, joint: Joint | None = None
) -> Reading:
    """Read time and latent of an evaluation, and how it came about from the previous one."""
    times = torch.as_tensor(time, device=latent.device).float().flatten()
    parts = [times.min(), times.max(), torch.linalg.vector_norm(latent.float())]
    if moved is not None:
        parts.extend(moved.products.flatten())
    own = len(parts)
    if joint is not None:
        parts.extend(joint.values())
    values = torch.stack(parts).tolist()
    low, high, norm, *products = values[:own]
    fetched = moved.fetched(products) if moved is not None else None
    both = joint.fetched(values[own:]) if joint is not None else None
    precision = torch.finfo(latent.dtype).eps
    return Reading(low, low == high, math.isfinite(norm), precision, fetched, both)
