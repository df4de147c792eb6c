"""What is fetched from the device for one evaluation, in one transfer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from specdiff.runtime.sampler.displacement import POOR_FIT, Displacement
from specdiff.runtime.sampler.guidance_pair import Joint
from specdiff.runtime.sampler.noise import Process
from specdiff.runtime.sampler.row_times import RowTimes, UnreadTimes


@dataclass(frozen=True)
class Reading:
    """The host's view of one evaluation."""

    times: RowTimes
    finite: bool
    """Whether the latent has no NaN and no infinity."""
    precision: float = 0.0
    """Relative rounding of the latent."""
    moved: Displacement | None = None
    """How the sampler came here, if there is a previous evaluation; on the host."""
    joint: Joint | None = None
    """The same by both halves of guidance, if another stream has the other one; on the host."""
    pace: Tensor | None = None
    """Each row's latest step in time by their mean, [B, 1]; None where they moved alike."""

    @cached_property
    def time(self) -> float:
        """Of the evaluation."""
        return self.times.time

    @cached_property
    def change(self) -> float:
        """Relative change of the latent since the previous evaluation; 0.0 if there is none."""
        return self.moved.change.item() if self.moved is not None else 0.0

    def rounding(self, seen: Displacement) -> float:
        """What rounding of the latent may add to a step, relative to the step's length."""
        return seen.rounding(self.precision).item()

    def is_strange(self, candidates: Sequence[Process], start: float) -> bool:
        """Whether no candidate, nor rounding, explains how the latent came here since `start`."""
        seen = self.joint.moved if self.joint is not None else self.moved
        if seen is None or not self.change:
            return False
        return seen.residual(candidates, start, self.time) > POOR_FIT + self.rounding(seen)


def read(
    times: UnreadTimes,
    latent: Tensor,
    moved: Displacement | None,
    joint: Joint | None = None,
    pace: Tensor | None = None,
) -> Reading:
    """Read times and latent of an evaluation, and how it came about from the previous one."""
    parts = [torch.linalg.vector_norm(latent.float()), *times.values()]
    said = len(parts)
    if moved is not None:
        parts.extend(moved.products.flatten())
    own = len(parts)
    if joint is not None:
        parts.extend(joint.values())
    norm, *values = torch.stack(parts).tolist()
    read_times = times.fetched(values[: said - 1])
    fetched = moved.fetched(values[said - 1 : own - 1]) if moved is not None else None
    both = joint.fetched(values[own - 1 :]) if joint is not None else None
    precision = torch.finfo(latent.dtype).eps
    return Reading(read_times, math.isfinite(norm), precision, fetched, both, pace)
