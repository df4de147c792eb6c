"""What each evaluation runs: every token, K of them, or none.

The paper's plan (warm-up, then K always), whole-step caching (K = 0 between refreshes) and every
mixture of the two are points of one space. A `Plan` states such a mixture evaluation by evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from specdiff.plan import Plan
from specdiff.runtime.clock import evaluations_left, evaluations_planned
from specdiff.settings import Settings

TAPER = 16
"""Evaluations over which a tapered plan grows the distance of dense ones by `refresh_interval`."""
LATE = 2.6
"""Evaluations to the end below which a tapered plan is dense: the last two, if a guess is right."""
ROWS = 8
"""Tokens are computed in multiples of it: matrix kernels are slower for what falls short of one
(H100, bf16: 717 rows take 151 µs where 720 take 136; `examples/research/kernels.py`)."""
MANY_ROWS = 8 * ROWS
"""Fewer tokens stay as they are: filling them up would take more of a step than it gives."""


def active_tokens(tokens: int, ratio: float) -> int:
    """Of so many, those that a step computes which leaves out this share."""
    active = round((1 - ratio) * tokens)
    return min(-(-active // ROWS) * ROWS, tokens) if active >= MANY_ROWS else active


@dataclass(frozen=True)
class Place:
    """Where in its generation an evaluation is."""

    index: int
    """From 0."""
    left: float
    """Evaluations left, this one included, as far as is known."""
    total: float
    """Evaluations of the generation until time ends, as far as is known; only plans ask."""
    before: float
    """The same, as it was known at the previous evaluation."""

    @classmethod
    def of(cls, times: Sequence[float], given: Sequence[float] | None, usual: int) -> Place:
        """From the times so far, this evaluation's included.

        Args:
            times: of the evaluations.
            given: all times of the run, if known.
            usual: evaluations to expect while the times do not tell; 0: the total is not needed.
        """
        left, seen = evaluations_left(times, given), (times, times[:-1])
        totals = (evaluations_planned(s, given, usual) if usual else 0 for s in seen)
        return cls(len(times) - 1, left, *totals)

    @classmethod
    def known(cls, index: int, total: int) -> Place:
        """Of a generation that has `total` evaluations."""
        return cls(index, total - index, total, total)


@dataclass(frozen=True)
class Schedule:
    """The plan of one generation over N tokens."""

    tokens: int
    """N"""
    segments: int
    """Prunable segments that the tokens belong to; each has its share of the active ones."""
    cache_ratio: float
    """Share of tokens that a step between dense ones does not compute; 1: it computes nothing."""
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
    plan: Plan | None = None
    """What counts instead of all of the above but `text_refresh`."""

    @classmethod
    def of(cls, settings: Settings, lengths: Sequence[int]) -> Schedule:
        """The plan that `settings` ask for, over prunable segments of these lengths."""
        return _schedule(
            sum(lengths),
            len(lengths),
            settings.cache_ratio,
            settings.warmup_steps,
            settings.refresh_interval,
            settings.stride,
            settings.text_refresh,
            settings.tapered,
            settings.plan,
        )

    @property
    def active(self) -> int:
        """K: tokens that a step between dense ones computes; 0: it computes nothing."""
        return self._active(self.cache_ratio)

    @cached_property
    def selects(self) -> bool:
        """Whether any step computes some but not all tokens, so that caches are needed."""
        return any(0 < self._active(ratio) < self.tokens for ratio in self._ratios)

    @cached_property
    def forecasts(self) -> bool:
        """Whether any token is ever forecast."""
        partial = any(self._active(ratio) < self.tokens for ratio in self._ratios)
        return partial and (self.plan is not None or self.refresh_interval != 1)

    @property
    def usual(self) -> int:
        """Evaluations that it is made for; 0: any number."""
        return len(self.plan.ratios) if self.plan else 0

    def decide(self, place: Place) -> tuple[int, str]:
        """Tokens to compute at an evaluation of a generation, and why so many."""
        if self.plan is not None:
            return self._follow(self.plan, place)
        since_dense = self._since_dense(place.index)
        if place.index < self.warmup_steps:
            return self.tokens, "warm-up"
        if self.active == self.tokens:
            return self.tokens, "no token may be left out"
        if not since_dense:
            how = "at most " if self.tapered else ""
            return self.tokens, f"dense {how}every {self.refresh_interval}"
        if self.tapered and self.refresh_interval and place.left < LATE:
            return self.tokens, "near the end"
        if self.active and since_dense % self.stride == 0:
            return self.active, f"the {self.active} highest scores"
        return 0, "forecast from earlier steps"

    def text(self, before: int) -> bool:
        """Whether a selective evaluation computes text, after so many since the last dense one."""
        return bool(self.text_refresh) and (before + 1) % self.text_refresh == 0

    def _follow(self, plan: Plan, place: Place) -> tuple[int, str]:
        entry = plan.due(place.index, place.total, place.before)
        if entry is None:
            return 0, "between two evaluations of the plan"
        count = self._active(plan.ratios[entry])
        return count, f"the plan's evaluation {entry + 1} of {len(plan.ratios)}"

    def _active(self, ratio: float) -> int:
        active = active_tokens(self.tokens, ratio)
        return max(active, self.segments) if active else 0

    @property
    def _ratios(self) -> tuple[float, ...]:
        return self.plan.ratios if self.plan else (self.cache_ratio,)

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


@lru_cache(maxsize=64)
def _schedule(*fields: Any) -> Schedule:
    """One object for equal fields, as every evaluation asks."""
    return Schedule(*fields)
