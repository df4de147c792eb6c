"""Times of a batch: rows may be at times of their own, and tokens of a row at two.

    every row at one time             700, 700                   as most pipelines have it
    rows at times of their own        700, 560                   that move the same way
    given frames                      0 700 700, 0 700 700       that stay where they are

The time of a row is its largest: that of the tokens that move, as time falls. Where one number is
wanted for the whole batch, such as the place in a plan, it is the mean of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowTimes:
    """Times of one evaluation, read from the device."""

    rows: tuple[float, ...]
    """Of each of the R rows: B, or 1 where the rows share their times."""
    still: tuple[float, ...]
    """The smallest in each row: that of given frames, else the row's own."""
    scattered: bool
    """Whether a row has more than these two."""
    on_device: Tensor
    """`rows` as float32 [R, 1]."""

    @property
    def time(self) -> float:
        """Of the evaluation."""
        return sum(self.rows) / len(self.rows) if self.differ else self.rows[0]

    @property
    def differ(self) -> bool:
        """Whether rows are at times of their own."""
        return any(time != self.rows[0] for time in self.rows)

    @property
    def uniform(self) -> bool:
        """Whether there is one time only."""
        return not self.differ and self.still == self.rows

    def follow(self, before: RowTimes) -> bool:
        """Whether no row moved against the others, and given frames stayed where they were."""
        if len(self.rows) != len(before.rows):
            return False
        steps = [now - then for now, then in zip(self.rows, before.rows, strict=True)]
        given = (
            (now, then)
            for row, now, then in zip(self.rows, self.still, before.still, strict=True)
            if now != row
        )
        return (min(steps) >= 0 or max(steps) <= 0) and all(now == then for now, then in given)


@dataclass(frozen=True)
class UnreadTimes:
    """Times of one evaluation, on the device."""

    rows: Tensor
    """float32 [R, 1]"""
    within: tuple[Tensor, ...] = ()
    """Where a row has several numbers: their smallest, [R, 1], and whether there are others than
    the smallest and the largest, a float32 scalar."""

    @classmethod
    def of(cls, time: object, batch: int, device: torch.device) -> UnreadTimes:
        """Of a time input: a number, or a tensor of one a batch, a row, a frame or a token."""
        times = torch.as_tensor(time, device=device).float()
        rows = times.reshape(batch if times.numel() % batch == 0 else 1, -1)
        if rows.shape[1] == 1:
            return cls(rows)
        top, low = rows.amax(1, keepdim=True), rows.amin(1, keepdim=True)
        others = ((rows != top) & (rows != low)).any().float()
        return cls(top, (low, others))

    def pace(self, before: RowTimes | None) -> Tensor | None:
        """Each row's step in time relative to their mean, [R, 1]; None where rows were together."""
        if before is None or not before.differ or self.rows.shape != before.on_device.shape:
            return None
        steps = self.rows - before.on_device
        mean = steps.mean()
        return torch.where(mean == 0, 1.0, steps / mean)

    def values(self) -> list[Tensor]:
        """What to fetch from the device, as scalars, for `fetched`."""
        return [value for part in (self.rows, *self.within) for value in part.flatten()]

    def read(self) -> RowTimes:
        """The same on the host, fetched by itself."""
        return self.fetched(torch.stack(self.values()).tolist())

    def fetched(self, values: Sequence[float]) -> RowTimes:
        """The same on the host."""
        count = len(self.rows)
        rows = tuple(values[:count])
        if not self.within:
            return RowTimes(rows, rows, False, self.rows)
        return RowTimes(rows, tuple(values[count:-1]), bool(values[-1]), self.rows)


def paced(prediction: Tensor, pace: Tensor | None) -> Tensor:
    """A prediction [B, ...], each row scaled by its pace [B, 1], as if all rows moved alike."""
    if pace is None or len(pace) not in (1, len(prediction)):
        return prediction
    return prediction * pace.reshape(-1, *[1] * (prediction.dim() - 1)).to(prediction)
