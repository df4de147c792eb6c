"""What each evaluation runs: every token, K of them, or none.

The paper's plan (warm-up, then K always), whole-step caching (K = 0 between refreshes) and every
mixture of the two are points of one space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specdiff.options import Settings


@dataclass(frozen=True)
class Schedule:
    """The plan of one generation over N tokens."""

    tokens: int
    """N"""
    active: int
    """K: tokens that a step between dense ones computes; 0: it computes nothing."""
    warmup_steps: int
    refresh_interval: int
    """Evaluations from one dense one to the next; 0: none after warm-up."""
    stride: int
    """Evaluations from one that computes any token to the next."""

    @classmethod
    def of(cls, settings: Settings, lengths: Sequence[int]) -> Schedule:
        """The plan that `settings` ask for, over prunable segments of these lengths."""
        tokens = sum(lengths)
        active = round((1 - settings.cache_ratio) * tokens)
        if active:
            active = max(active, len(lengths))  # every segment has its share
        return cls(
            tokens, active, settings.warmup_steps, settings.refresh_interval, settings.stride
        )

    @property
    def selects(self) -> bool:
        """Whether any step computes some but not all tokens, so that caches are needed."""
        return 0 < self.active < self.tokens

    def count(self, index: int) -> int:
        """Tokens to compute at evaluation `index` (from 0) of a generation."""
        return self.decide(index)[0]

    def decide(self, index: int) -> tuple[int, str]:
        """Tokens to compute at evaluation `index` (from 0) of a generation, and why so many."""
        after_warmup = index - self.warmup_steps + 1
        if after_warmup <= 0:
            return self.tokens, "warm-up"
        if self.active == self.tokens:
            return self.tokens, "no token may be left out"
        if self.refresh_interval and after_warmup % self.refresh_interval == 0:
            return self.tokens, f"dense every {self.refresh_interval}"
        since_dense = (
            after_warmup % self.refresh_interval if self.refresh_interval else after_warmup
        )
        if self.active and since_dense % self.stride == 0:
            return self.active, f"the {self.active} highest scores"
        return 0, "forecast from earlier steps"
