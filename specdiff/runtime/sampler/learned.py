"""Learned: exact times of a flow whose model gets rounded ones, from how an earlier run moved.

A model may get its time in bfloat16, with three digits: too few to tell how long the sampler's next
step is. But each step moves the latent by its exact length times the prediction, and the next run
of the same settings takes the same steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

MOST_RUNS = 16
LEAST_TIME = 1e-3
"""Share of the first time below which a smaller one counts for no more."""

Times = tuple[float, ...]


class LearnedTimes:
    """The exact times of runs of one graph, by the times that its model got."""

    def __init__(self) -> None:
        self._runs: dict[Times, Times] = {}

    def keep(self, rounded: Sequence[float], exact: Times) -> None:
        """Remember a run that has come to its end, as far as can be told."""
        self._runs.pop(tuple(rounded[:-1]), None)  # it had not
        self._runs.pop(tuple(rounded), None)
        self._runs[tuple(rounded)] = exact
        if len(self._runs) > MOST_RUNS:
            del self._runs[next(iter(self._runs))]

    def find(self, rounded: Sequence[float]) -> Times | None:
        """All exact times of the latest run that began with these."""
        begun = tuple(rounded)
        for run, exact in reversed(self._runs.items()):
            if run[: len(begun)] == begun:
                return exact
        return None


def exact_times(rounded: Sequence[float], steps: Sequence[float], precision: float) -> Times | None:
    """Times before they were rounded, or None where the steps do not lead from one to the next.

    Args:
        rounded: as the model got them.
        steps: between each two of them, as measured.
        precision: relative rounding.
    """
    passed = list(itertools.accumulate(steps, initial=0.0))
    # Rounding is in proportion: the smallest times tell best where all of them are.
    least = LEAST_TIME * max(map(abs, rounded))
    weights = [1 / max(abs(time), least) ** 2 for time in rounded]
    starts = [
        weight * (time - far) for weight, time, far in zip(weights, rounded, passed, strict=True)
    ]
    exact = tuple(sum(starts) / sum(weights) + far for far in passed)
    wrong = (abs(a - b) > precision * abs(b) for a, b in zip(exact, rounded, strict=True))
    return None if any(wrong) else exact
