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
    text_refresh: int
    """Selective evaluations from one that computes text to the next; 0: dense ones alone do."""

    @classmethod
    def of(cls, settings: Settings, lengths: Sequence[int]) -> Schedule:
        """The plan that `settings` ask for, over prunable segments of these lengths."""
        tokens = sum(lengths)
        active = round((1 - settings.cache_ratio) * tokens)
        if active:
            active = max(active, len(lengths))  # every segment has its share
        return cls(
            tokens,
            active,
            settings.warmup_steps,
            settings.refresh_interval,
            settings.stride,
            settings.text_refresh,
        )

    @property
    def selects(self) -> bool:
        """Whether any step computes some but not all tokens, so that caches are needed."""
        return 0 < self.active < self.tokens

    def count(self, index: int) -> int:
        """Tokens to compute at evaluation `index` (from 0) of a generation."""
        since_dense = self._since_dense(index)
        if since_dense == 0 or self.active == self.tokens:
            return self.tokens
        return self.active if since_dense % self.stride == 0 else 0

    def text(self, index: int) -> bool:
        """Whether a selective evaluation computes text."""
        selective = self._since_dense(index) // self.stride
        return bool(self.text_refresh and selective % self.text_refresh == 0)

    def _since_dense(self, index: int) -> int:
        after_warmup = max(index - self.warmup_steps + 1, 0)
        return after_warmup % self.refresh_interval if self.refresh_interval else after_warmup
