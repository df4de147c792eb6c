"""What each evaluation runs: every token, K of them, or none.

The paper's plan (warm-up, then K always), whole-step caching (K = 0 between refreshes) and every
mixture of the two are points of one space.
"""

from __future__ import annotations

from dataclasses import dataclass

from specdiff.options import Settings

ROUNDING = 1e-6
"""Times arrive as float32: a distance that is due must not miss by their last bit."""


@dataclass(frozen=True)
class Schedule:
    """The plan of one generation over N tokens."""

    tokens: int
    """N"""
    active: int
    """K: tokens that a step between dense ones computes; 0: it computes nothing."""
    warmup_steps: int
    refresh_interval: float
    """Sigma from one dense evaluation to the next."""
    stride: float
    """Sigma from one computed evaluation to the next."""

    @classmethod
    def of(cls, settings: Settings, tokens: int) -> Schedule:
        """The plan that `settings` ask for."""
        active = round((1 - settings.cache_ratio) * tokens)
        return cls(
            tokens, active, settings.warmup_steps, settings.refresh_interval, settings.stride
        )

    @property
    def selects(self) -> bool:
        """Whether any step computes some but not all tokens, so that caches are needed."""
        return 0 < self.active < self.tokens

    def count(self, index: int, since_dense: float, since_computed: float) -> int:
        """Tokens to compute at evaluation `index` (from 0) of a generation.

        Args:
            index: evaluations of this generation so far.
            since_dense: distance in sigma from the last dense evaluation.
            since_computed: distance in sigma from the last that computed any token.
        """
        due = self.refresh_interval < 1 and since_dense >= self.refresh_interval - ROUNDING
        if index < self.warmup_steps or due or self.active == self.tokens:
            return self.tokens
        return self.active if since_computed >= self.stride - ROUNDING else 0
