"""Clock: which way time runs, where it ends, and when the next evaluation is due."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

LEVER = 3
"""Evaluations between two times that a guess of the next rests on: far apart, their rounding (a
bf16 time has three digits) does little harm."""
NEAR = 0.5
"""Share of a step within which a guess of the next time is taken to be the end."""
ROUNDED = 50
"""How far time must have come, in units of its last significant bit, for the number of evaluations
to be read off: rounding (bf16) makes it wild at first."""
HARDLY = 1.0
"""Evaluations that a last one which is hardly a step may count for less than one."""
SHIFT = 3.0
"""Of the flow that presets are tuned on."""
BY_NOISE = 2 / 3
"""Weight of the noise, beside the number of the step, in where a run is. By noise alone is as good
for Karras and exponential sigmas, less so for beta (28 and 50 steps of the demo model)."""
EVEN = 0.02
"""How far a step may be from its even place, as a share of the run."""
MIDDLE = 4
"""Steps from which on a schedule has a middle."""
CUT_OFF = 0.08
"""Share of a run by noise, at its end, in which uneven times may stop and leave the rest to one
step: too long a guess of it corrects too little, which is made good later; too short a one, too
much."""
AWAY = 0.8
"""Shift below which times are none of a flow: its steps are shifted towards noise, if at all."""
DRIFT = 0.05
"""By how much, as a share, the length that half of a flow's times tell differs from what all do."""
ROUNDED_SHIFT, ROUNDED_DRIFT = 4.5, 9.0
"""How much further rounding leads: so often the unit of the times over the square of how far they
came. Even times in bf16, fp16 and whole thousandths, of shifts from 1 (0.5) to 30, need 4.1 (8.2)
of it."""
CLOSE = 0.3
"""Evaluations by which a number may differ from the usual one that it is then taken for."""


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
    if evaluations_left(times, None) < 1 + NEAR or _may_end(times):
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


def evaluations_planned(times: Sequence[float], given: Sequence[float] | None, usual: int) -> float:
    """How many evaluations the generation has until time ends, those still to come included.

    Where they are not given, times are taken to be evenly spaced up to a shift towards noise, as a
    flow's are. Not whole where the last one is hardly a step away from the end (27.08 for 28 of
    Stable Diffusion 3).

    Args:
        times: of the evaluations so far, the current one included.
        given: all times of the run, if known.
        usual: the number where `times` do not tell, or nearly this.
    """
    if given is not None:
        guess = _total(given)
        return guess if len(given) - HARDLY <= guess <= len(given) else len(given)
    distance = abs(times[-1] - times[0]) / time_unit(times) if times else 0.0
    if not distance:
        return usual
    guess = _total(times) if distance > ROUNDED * _precision(times) else math.nan
    if math.isnan(guess):  # steps grow towards the end: there are no more than at their mean so far
        whole = abs(times[0] - end_of(times)) / time_unit(times)
        return min(usual, (len(times) - 1) * whole / distance)
    return usual if abs(guess - usual) <= CLOSE else guess


def of_steps(given: Sequence[float]) -> Sequence[float] | None:
    """When steps of two evaluations begin, where `given` has such; None where it has others.

    Heun's second evaluation is at the time of the next step's first: 900, 800, 800, 700, 700.
    """
    pairs = list(zip(given[1::2], given[2::2], strict=False))
    paired = bool(pairs) and len(given) % 2 == 1 and all(a == b for a, b in pairs)
    return given[::2] if paired else None


def unlike_a_flow(given: Sequence[float]) -> tuple[float, ...] | None:
    """How far the run has come at each evaluation, from 0 to 1, where times are not a flow's.

    Presets are tuned on even steps shifted towards noise by `SHIFT`. Other schedules (Karras,
    exponential, beta) have theirs elsewhere, so that a place counts by its noise, in part by the
    number of the step. None where times are even up to any shift: its number says it all.
    """
    last, unit, end = len(given) - 1, time_unit(given), end_of(given)
    sigmas = [abs(time - end) / unit for time in given]
    if last < MIDDLE or not _falls(sigmas):
        return None
    ends = [sigmas[index] for index in (0, last // 2, last)]
    own = _shift([1 / sigma - 1 for sigma in ends], last // 2, last) if min(ends) > 0 else 1.0
    even = _spread([_evenly(sigma, own if own > 0 else 1.0) for sigma in sigmas])
    if all(abs(here - index / last) < EVEN for index, here in enumerate(even)):
        return None
    by_noise = _spread([_evenly(sigma, SHIFT) for sigma in sigmas])
    return tuple(BY_NOISE * c + (1 - BY_NOISE) * i / last for i, c in enumerate(by_noise))


def uneven_so_far(times: Sequence[float]) -> tuple[float, float] | None:
    """How far the run had come at the previous evaluation and at this one, from 0 to 1, by noise.

    None where the times so far may be even up to a shift: their number says it all. Others tell
    another length the longer one looks, so that no guess of the end can be relied on.
    """
    if len(set(times)) < max(len(times), 3) or not (_leads_away(times) or _drifts(times)):
        return None
    unit, end = time_unit(times), end_of(times)
    sigmas = [abs(time - end) / unit for time in (times[0], *times[-2:])]
    if not _falls(sigmas):
        return None
    first, before, now = (_evenly(sigma, SHIFT) for sigma in sigmas)
    return 1 - before / first, 1 - now / first


def _falls(sigmas: Sequence[float]) -> bool:
    """Whether these are noise, from 1 down: EDM's times, log(sigma) / 4, pass through 0 midway."""
    return sigmas[0] <= 1 and all(then < now for now, then in itertools.pairwise(sigmas))


def _may_end(times: Sequence[float]) -> bool:
    """Whether uneven times may stop here."""
    came = uneven_so_far(times)
    return came is not None and came[1] > 1 - CUT_OFF


def _leads_away(times: Sequence[float]) -> bool:
    """Whether steps are shifted away from noise, as Karras and exponential sigmas are at first."""
    shift = _shift_of(times)
    return shift is not None and shift < AWAY - ROUNDED_SHIFT * _rounding(times)


def _drifts(times: Sequence[float]) -> bool:
    """Whether half of the times tell another length of the run than all of them do."""
    half = times[: len(times) // 2 + 1]
    if len(times) <= MIDDLE:
        return False
    earlier, later = _total(half), _total(times)
    allowed = DRIFT + ROUNDED_DRIFT * _rounding(half)  # from 1 on rounding may do anything
    return allowed < 1 and abs(later - earlier) > allowed * min(later, earlier)  # not if one is NaN


def _rounding(times: Sequence[float]) -> float:
    """What rounding does to a shift and a length that times tell, up to a factor."""
    return _precision(times) * (time_unit(times) / (times[-1] - times[0])) ** 2


def _spread(values: Sequence[float]) -> list[float]:
    """From 0 to 1."""
    return [(values[0] - value) / (values[0] - values[-1]) for value in values]


def _evenly(sigma: float, shift: float) -> float:
    """What falls evenly in a flow of this shift: u of sigma = shift u / (1 + (shift - 1) u)."""
    return sigma / (shift - (shift - 1) * sigma)


def _shift(odds: Sequence[float], middle: int, last: int) -> float:
    """The shift k of a flow with these odds, 1 / sigma - 1, at its steps 0, `middle` and `last`.

    u = 1 / (1 + k odds) falls evenly, so (u_0 - u_m) l = (u_0 - u_l) m; solved for k in `_total`.
    1 where nothing tells it; not positive where no flow is like this.
    """
    first, between, newest = odds
    rise, whole = (between - first) * last, (newest - first) * middle
    below = whole * between - rise * newest
    return (rise - whole) / below if below else 1.0


def _precision(times: Sequence[float]) -> float:
    """Of one of the last three, as a share: what its significant bits tell apart."""
    return 2.0 ** -max(map(_bits, times[-3:]))


def _bits(time: float) -> int:
    """Significant bits of a number."""
    numerator = abs(time.as_integer_ratio()[0])
    return (numerator // (numerator & -numerator)).bit_length() if numerator else 0


def _total(times: Sequence[float]) -> float:
    """Evaluations until time ends, by sigma = k u / (1 + (k - 1) u) with u falling evenly.

    Solved for u: u = 1 / (1 + k odds) with odds = 1 / sigma - 1. As u falls evenly from the first
    time (0) over a middle one (m) to the last (l), (u_0 - u_m) l = (u_0 - u_l) m. This gives k:

        k = (rise - whole) / (whole odds_m - rise odds_l)
        rise = (odds_m - odds_0) l,  whole = (odds_l - odds_0) m

    u loses u_0 - u_l in l steps, so u_l lasts for l u_l / (u_0 - u_l) more. Example: sigmas 1, 0.9,
    0.75 have odds 0, 1/9, 1/3; so k = 3, u = 1, 3/4, 1/2, and 2 + 2 (1/2) / (1/2) = 4 evaluations.

    Returns:
        Their number, as `Plan.due` takes it: need not be whole. NaN where the times tell no k.
    """
    shift = _shift_of(times)
    if shift is None:
        return math.nan
    last, unit, end = len(times) - 1, time_unit(times), end_of(times)
    sigmas = (abs(time - end) / unit for time in (times[0], times[-1]))
    start, here = (1 / (1 + shift * (1 / sigma - 1)) for sigma in sigmas)
    return last + here * last / (start - here) if start > here else math.nan


def _shift_of(times: Sequence[float]) -> float | None:
    """The positive shift of the flow that has the first, the middle and the last of these times."""
    last, middle = len(times) - 1, (len(times) - 1) // 2
    if middle < 1:
        return None
    unit, end = time_unit(times), end_of(times)
    sigmas = [abs(times[index] - end) / unit for index in (0, middle, last)]
    if min(sigmas) <= 0 or len(set(sigmas)) < 3:
        return None
    shift = _shift([1 / sigma - 1 for sigma in sigmas], middle, last)
    return shift if shift > 0 else None


def _next_step(times: Sequence[float]) -> float:
    """By the parabola through three times, or the line through two."""
    lever = min(LEVER, (len(times) - 1) // 2)
    if not lever:
        return times[-1] - times[-2]
    ahead = 1 / lever
    newest, middle, oldest = times[-1], times[-1 - lever], times[-1 - 2 * lever]
    return ahead * ((3 + ahead) * newest - 2 * (2 + ahead) * middle + (1 + ahead) * oldest) / 2
