"""What a stream remembers of its tokens: merged outputs by step, computed outputs by token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DEPTH = 3

Clock = float | Tensor
"""A time, or that of each row, float32 [B, 1]."""


class StepOutput(NamedTuple):
    """The merged output of one evaluation."""

    time: Clock
    tokens: Tensor
    """[B, N, C]"""


class ComputedOutput(NamedTuple):
    """For each token, one of the last outputs that the network computed for it."""

    times: Tensor
    """float32 [B, N]: when it was computed."""
    tokens: Tensor
    """[B, N, C]"""


class History:
    """Outputs of the current generation, newest first, at most `DEPTH` of each kind.

    No tensor is changed after it was stored: every record makes new ones.
    """

    def __init__(self, batch: int, tokens: int, device: torch.device) -> None:
        self.evaluations = 0
        self.steps: tuple[StepOutput, ...] = ()
        self.computed: tuple[ComputedOutput, ...] = ()
        self.counts = torch.zeros(batch, tokens, dtype=torch.int32, device=device)
        """int32 [B, N]: how often each token was computed."""
        self.age = torch.zeros_like(self.counts)
        """int32 [B, N]: evaluations since each token was last computed."""

    def record_dense(self, time: Clock, tokens: Tensor) -> None:
        """Every token was computed: `tokens` [B, N, C], owned by the history from now on."""
        newest = ComputedOutput(self._of_each(time), tokens)
        self.computed = (newest, *self.computed)[:DEPTH]
        self.counts = self.counts + 1
        self.age = torch.zeros_like(self.age)
        self._record_step(time, tokens)

    def record_selective(self, time: Clock, merged: Tensor, active: Tensor) -> None:
        """`merged` [B, N, C] holds new outputs at `active` (int64 [B, K]), forecasts elsewhere."""
        fresh = torch.zeros_like(self.counts, dtype=torch.bool).scatter(1, active, True)
        newest = ComputedOutput(self._of_each(time), merged)
        # A token that stays behind keeps its entries; where the record is shorter than DEPTH its
        # oldest entry is repeated, which forecasters see as two equal times.
        kept = (*self.computed, self.computed[-1])[:DEPTH]
        shifted = (newest, *kept)
        self.computed = tuple(
            ComputedOutput(
                torch.where(fresh, new.times, old.times),
                torch.where(fresh.unsqueeze(-1), new.tokens, old.tokens),
            )
            for new, old in zip(shifted, kept, strict=False)
        )
        self.counts = self.counts + fresh
        self.age = (self.age + 1).masked_fill(fresh, 0)
        self._record_step(time, merged)

    def record_skipped(self, time: Clock, forecast: Tensor) -> None:
        """No token was computed: `forecast` [B, N, C] was handed out."""
        self.age = self.age + 1
        self._record_step(time, forecast)

    def break_off(self) -> None:
        """Forget what was computed: it leads nowhere from here."""
        self.computed = ()

    @property
    def cached(self) -> Tensor:
        """int32 [B, N]: how often each token was served from cache (the paper's cf)."""
        return self.evaluations - self.counts

    def _of_each(self, time: Clock) -> Tensor:
        """float32 [B, N]: a time, of each token."""
        if isinstance(time, Tensor):
            return time.expand(self.counts.shape)
        return torch.full_like(self.counts, time, dtype=torch.float32)

    def _record_step(self, time: Clock, tokens: Tensor) -> None:
        self.steps = (StepOutput(time, tokens), *self.steps)[:DEPTH]
        self.evaluations += 1
