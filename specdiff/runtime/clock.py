"""Clock: which way time runs, where it ends, and when the next evaluation is due."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

LEVER = 3
"""Evaluations between two times that a guess of the next rests on: far apart, their rounding (a
bf16 time has three digits) does little harm."""
NEAR = 0.5
"""Share of a step within which a guess of the next time is taken to be the end."""


def time_unit(times: Sequence[float]) -> Literal[1, 1000]:
    """The time at which sigma (or 1 - sigma) is 1, from its size."""
    return 1000 if max(abs(time) for time in times) > 1.5 else 1


def end_of(times: Sequence[float]) -> float:
    """Where time runs to, from at least two distinct times: 0, or the unit where it rises."""
    return time_unit(times) if times[-1] > times[0] else 0


def next_time(times: Sequence[float], given: Sequence[float] | None) -> float:
    """The time of the next evaluation, or the end if there is none.

    Args:
        times: of the evaluations so far, the current one included.
        given: all times of the run, if known; else the next is guessed from three of `times`.
    """
    if given is not None:
        return given[len(times)] if len(times) < len(given) else end_of([*given, *times])
    if evaluations_left(times, None) < 1 + NEAR:
        return end_of(times)
    return times[-1] + _next_step(times)


def evaluations_left(times: Sequence[float], given: Sequence[float] | None) -> float:
    """How many evaluations are left, the current one included; infinity where none can guess.

    Arguments as of `next_time`.
    """
    if given is not None:
        return max(len(given) - len(times), 0) + 1
    if times[-1] == times[0]:
        return math.inf
    step, left = _next_step(times), end_of(times) - times[-1]
    return left / step if step * left > 0 else 1.0


def _next_step(times: Sequence[float]) -> float:
    """By the parabola through three times, or the line through two."""
    lever = min(LEVER, (len(times) - 1) // 2)
    if not lever:
        return times[-1] - times[-2]
    ahead = 1 / lever
    newest, middle, oldest = times[-1], times[-1 - lever], times[-1 - 2 * lever]
    return ahead * ((3 + ahead) * newest - 2 * (2 + ahead) * middle + (1 + ahead) * oldest) / 2
