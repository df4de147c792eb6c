"""What each evaluation runs: every token, K of them, or none.

The paper's plan (warm-up, then K always), whole-step caching (K = 0 between refreshes) and every
mixture of the two are points of one space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specdiff.options import Settings

TAPER = 16
"""Evaluations over which a tapered plan grows the distance of dense ones by `refresh_interval`."""
LATE = 2.6
"""Evaluations to the end below which a tapered plan is dense: the last two, if a guess is right."""


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
    tapered: bool
    """Whether dense evaluations are close together at first, as errors made early grow, and the
    last two are dense, as nothing follows that could make their errors good."""

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
            settings.tapered,
        )

    @property
    def selects(self) -> bool:
        """Whether any step computes some but not all tokens, so that caches are needed."""
        return 0 < self.active < self.tokens

    @property
    def forecasts(self) -> bool:
        """Whether any token is ever forecast."""
        return self.active < self.tokens and self.refresh_interval != 1

    def decide(self, index: int, left: float) -> tuple[int, str]:
        """Tokens to compute at evaluation `index` (from 0) of a generation, and why so many.

        `left` evaluations are left, this one included, as far as is known.
        """
        since_dense = self._since_dense(index)
        if index < self.warmup_steps:
            return self.tokens, "warm-up"
        if self.active == self.tokens:
            return self.tokens, "no token may be left out"
        if not since_dense:
            how = "at most " if self.tapered else ""
            return self.tokens, f"dense {how}every {self.refresh_interval}"
        if self.tapered and self.refresh_interval and left < LATE:
            return self.tokens, "near the end"
        if self.active and since_dense % self.stride == 0:
            return self.active, f"the {self.active} highest scores"
        return 0, "forecast from earlier steps"

    def text(self, index: int) -> bool:
        """Whether a selective evaluation computes text."""
        selective = self._since_dense(index) // self.stride
        return bool(self.text_refresh and selective % self.text_refresh == 0)

    def _since_dense(self, index: int) -> int:
        """Evaluations since the last dense one; 0 if this is one."""
        last = self.warmup_steps - 1
        if index <= last:
            return 0
        if not self.refresh_interval:
            return index - last
        while (due := last + self._interval(last)) <= index:
            last = due
        return index - last

    def _interval(self, last: int) -> int:
        """From the dense evaluation `last` to the next."""
        widest = self.refresh_interval
        return min(widest, 2 + last * widest // TAPER) if self.tapered else widest
