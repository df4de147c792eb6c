"""What each evaluation runs: every token, K of them, or none.

A `Plan` says which evaluations are dense, and the cache ratio what fills its gaps: selective steps
always (the paper's method), none (whole-step caching), or any mixture that a list states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from specdiff.plan import Plan
from specdiff.runtime.sampler.timeline import (
    evaluations_left,
    evaluations_planned,
    of_steps,
    uneven_so_far,
    unlike_a_flow,
)
from specdiff.settings import Settings

ROWS = 8
"""Tokens are computed in multiples of it: matrix kernels are slower for what falls short of one
(H100, bf16: 717 rows take 151 µs where 720 take 136; `examples/research/kernels.py`)."""
UNSELECTABLE = "no tokens can be selected"
"""Why a step is dense that should compute some tokens."""
MANY_ROWS = 8 * ROWS
"""Fewer tokens stay as they are: filling them up would take more of a step than it gives."""


def active_tokens(tokens: int, ratio: float) -> int:
    """Of so many, those that a step computes which leaves out this share."""
    active = round((1 - ratio) * tokens)
    return min(-(-active // ROWS) * ROWS, tokens) if active >= MANY_ROWS else active


@dataclass(frozen=True)
class Place:
    """Where in its generation an evaluation is, in steps where those take two (Heun)."""

    index: int
    """From 0."""
    left: float
    """Evaluations left, this one included, as far as is known."""
    total: float
    """Evaluations of the generation until time ends, as far as is known; only lists ask."""
    before: float
    """The same, as it was known at the previous evaluation."""
    progress: tuple[float, ...] | None = None
    """How far the run has come at each evaluation, where that is known and uneven."""
    so_far: tuple[float, float] | None = None
    """How far it had come at the previous evaluation and at this one, where times that were found
    to be uneven are all that is known."""
    had: Sequence[int] = ()
    """Earlier evaluations that were to be dense by its plan."""

    @classmethod
    def of(
        cls,
        times: Sequence[float],
        given: Sequence[float] | None,
        usual: int,
        had: Sequence[int] = (),
    ) -> Place:
        """From the times so far, this evaluation's included; the two of a step are at one place.

        Args:
            times: of the evaluations.
            given: all times of the run, if known.
            usual: evaluations to expect while the times do not tell; 0: the total is not needed.
            had: earlier evaluations that were to be dense.
        """
        steps = of_steps(given) if given is not None else None
        if steps is not None:
            given, times = steps, steps[: (len(times) + 1) // 2]
        left, seen = evaluations_left(times, given), (times, times[:-1])
        total, before = (evaluations_planned(s, given, usual) if usual else 0 for s in seen)
        progress = unlike_a_flow(given) if given is not None and usual else None
        found = uneven_so_far(times) if given is None and usual else None
        return cls(len(times) - 1, left, total, before, progress, found, had)

    @classmethod
    def known(cls, index: int, total: int, progress: tuple[float, ...] | None = None) -> Place:
        """Of a generation that has `total` evaluations."""
        return cls(index, total - index, total, total, progress)


@lru_cache(maxsize=64)
def placed(plan: Plan, progress: tuple[float, ...]) -> tuple[int | None, ...]:
    """The entry of a list that is due at each evaluation; None: it lies in a gap.

    Each dense entry has an evaluation of its own, the nearest that is left, so that there are as
    many as were asked for.
    """
    if len(progress) <= len(plan.dense):
        return plan.dense[: len(progress)]
    whole, due, evaluation = len(plan.ratios) - 1, dict[int, int](), -1
    for number, entry in enumerate(plan.dense):
        after = len(plan.dense) - 1 - number
        free = range(evaluation + 1, len(progress) - after)
        evaluation = min(free, key=lambda i: abs(progress[i] - entry / whole))
        due[evaluation] = entry
    others = [round(share * whole) for share in progress]
    return tuple(
        due.get(i, None if plan.ratios[other] == 0 else other) for i, other in enumerate(others)
    )


def owed(plan: Plan, place: Place) -> int | None:
    """The entry of a list that is due in a run whose end nobody knows; None: it lies in a gap.

    Dense entries are due where the noise is theirs. Those that were passed while the times seemed
    even are made up for, no closer to each other than in the plan.
    """
    assert place.so_far is not None
    before, now = place.so_far
    whole, step, dense = len(plan.ratios), now - before, plan.dense
    passed, reached = (sum(e <= whole * (c + step / 2) for e in dense) for c in (before, now))
    if reached > passed:
        return dense[reached - 1]
    if reached > len(place.had) > 0:
        gap = dense[len(place.had)] - dense[len(place.had) - 1]
        if place.index - place.had[-1] >= gap:
            return dense[reached - 1]
    other = min(round(whole * now), whole - 1)
    return None if plan.ratios[other] == 0 else other


@dataclass(frozen=True)
class Schedule:
    """The plan of one generation over N tokens."""

    tokens: int
    """N"""
    segments: int
    """Prunable segments that the tokens belong to; each has its share of the active ones."""
    cache_ratio: float
    """Share of tokens that a step in a gap of the plan does not compute; 1: it computes nothing."""
    plan: Plan
    selectable: bool = True
    """Whether some tokens can be computed without the others; else such steps are dense."""

    @classmethod
    def of(cls, settings: Settings, lengths: Sequence[int], *, selectable: bool = True) -> Schedule:
        """For segments of these lengths."""
        ratio, plan = settings.cache_ratio, settings.plan
        return _schedule(sum(lengths), len(lengths), ratio, plan, selectable)

    @property
    def active(self) -> int:
        """K: tokens that a step in a gap of the plan computes; 0: it computes nothing."""
        return self._active(self.cache_ratio)

    @cached_property
    def selects(self) -> bool:
        """Whether any step computes some but not all tokens, so that caches are needed."""
        return any(0 < count < self.tokens for count in self._counts)

    @cached_property
    def forecasts(self) -> bool:
        """Whether any token is ever forecast."""
        return any(count < self.tokens for count in self._counts)

    @property
    def usual(self) -> int:
        """Evaluations that it is made for; 0: any number."""
        return len(self.plan.ratios)

    def decide(self, place: Place) -> tuple[int, str]:
        """Tokens to compute at an evaluation of a generation, and why so many."""
        if self.plan.rule is not None:
            why = self.plan.rule.why_dense(place.index, place.left)
            return (self.tokens, why) if why else self._in_gap()
        if place.progress is not None:
            entry = placed(self._list, place.progress)[place.index]
        elif place.so_far is not None:
            entry = owed(self._list, place)
        else:
            entry = self._list.due(place.index, place.total, place.before)
        if entry is None:
            return self._in_gap()
        count = self._active(self._list.ratios[entry])
        if self._is_unselectable(self._list.ratios[entry]):
            return count, UNSELECTABLE
        return count, f"the plan's evaluation {entry + 1} of {self.usual}"

    def _in_gap(self) -> tuple[int, str]:
        if self._is_unselectable(self.cache_ratio):
            return self.tokens, UNSELECTABLE
        if self.active == self.tokens:
            return self.tokens, "no token may be left out"
        if self.active:
            return self.active, f"the {self.active} highest scores"
        return 0, "forecast from earlier steps"

    @cached_property
    def _list(self) -> Plan:
        """The plan with the ratio of its gaps."""
        return self.plan.filled(self.cache_ratio)

    @cached_property
    def _counts(self) -> set[int]:
        """Tokens that steps which are not dense may compute."""
        rule = self.plan.rule
        gap = {self.cache_ratio} if rule is None or rule.has_gaps else set()
        return {self._active(ratio) for ratio in gap.union(self._list.ratios)}

    def _is_unselectable(self, ratio: float) -> bool:
        return not self.selectable and 0 < ratio < 1

    def _active(self, ratio: float) -> int:
        if self._is_unselectable(ratio):
            return self.tokens
        active = active_tokens(self.tokens, ratio)
        return max(active, self.segments) if active else 0


@lru_cache(maxsize=64)
def _schedule(
    tokens: int, segments: int, cache_ratio: float, plan: Plan, selectable: bool
) -> Schedule:
    """One object for equal fields, as every evaluation asks."""
    return Schedule(tokens, segments, cache_ratio, plan, selectable)
