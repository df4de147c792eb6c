"""Rehearsal: what a plan would cost, told by dense runs alone.

Forecasts and corrections are sums of predictions, whose weights depend on the plan and the times
alone. As long as the model is taken to answer as it did along the dense path, what a plan misses in
step i is a sum of that path's steps, too:

    m_i = sum over j of w_ij s_j        s_j: the move of the dense latent at j, by time

Its size |m_i| needs no more of a picture than the products of its moves, a matrix of numbers. So
thousands of plans cost less than one picture. Where the way bends, and so where computing pays, is
told well. How the model answers a latent that is off the path is not: what is found must be drawn.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from specdiff.plan import Plan
from specdiff.runtime.records.recording import StepRecord
from specdiff.runtime.sampler.timeline import end_of, time_unit
from specdiff.runtime.tokens.correction import Correction, on_top
from specdiff.runtime.tokens.forecast import forecast
from specdiff.runtime.tokens.history import History
from specdiff.runtime.tokens.schedule import Place, Schedule
from specdiff.tuning.places import Places

MOST = 64
"""Evaluations: of more, guesses would take longer than pictures."""
CHUNK = 2**16
"""Values of a latent that are looked at together, so that a video fits."""
LEAST = 1e-12
"""Mean square in place of 0, of a plan that misses nothing."""
GROWTH = 1.0
"""What is missed at the beginning counts e times as much as at the end. Of 16 plans of each of two
photographs, decibels and guesses then correlate by 0.93 and 0.83. How far off a latent is at most,
without growth, does by 0.86 and 0.83, and its plans came less close."""


class Rehearsal:
    """Of generations at the same times."""

    def __init__(self) -> None:
        self._times: tuple[float, ...] = ()
        self._products: list[Tensor] = []
        self._told = self._vain = False

    def watch(self, steps: Sequence[StepRecord]) -> None:
        """Learn from a dense generation, of which the latents were kept."""
        times = tuple(step.time for step in steps if step.time is not None)
        latents = [step.latent for step in steps if step.latent is not None]
        whole = len(times) == len(latents) == len(steps) and len(set(times)) == len(times) > 2
        if not whole or times != (self._times or times):
            self._vain = True
            return
        self._times, self._told = times, steps[0].told
        self._products.append(_products(times, latents))

    def guess(self) -> Callable[[Places], float] | None:
        """How little the steps of a plan miss, in dB: a mean of pictures.

        The last evaluation counts as computed: no latent tells where it led. None where steps are
        not known one by one, as of samplers that evaluate twice at a time, or are too many.
        """
        if self._vain or not self._products or len(self._times) > MOST:
            return None
        products, weights = torch.stack(self._products), _weights(self._times)
        computed = computed_by(self._times, told=self._told)

        @cache
        def closeness(places: Places) -> float:
            missed = _missed(self._times, places)
            squares = torch.einsum("ia,pab,ib->pi", missed, products, missed)
            return -10 * float((squares @ weights).clamp_min(LEAST).log10().mean())

        return lambda places: closeness(computed(places))


def _products(times: Sequence[float], latents: Sequence[Tensor]) -> Tensor:
    """Of the moves [E - 1, D] of a latent with each other: float64 [E - 1, E - 1], mean over D."""
    spans = torch.tensor(times, dtype=torch.float64).diff().unsqueeze(1)
    products = torch.zeros(len(spans), len(spans), dtype=torch.float64)
    for parts in zip(*(latent.flatten().split(CHUNK) for latent in latents), strict=True):
        moves = torch.stack([part.double().cpu() for part in parts]).diff(dim=0) / spans
        products += moves @ moves.T
    return products / latents[0].numel()


def _weights(times: Sequence[float]) -> Tensor:
    """Of the squares of what steps miss: float64 [E - 1]."""
    left = (torch.tensor(times[:-1], dtype=torch.float64) - end_of(times)).abs()
    return (2 * GROWTH * left / time_unit(times)).exp()


def computed_by(times: Sequence[float], *, told: bool) -> Callable[[Places], Places]:
    """Which evaluations a plan of places computes: it follows time, which may count them anew.

    Args:
        times: of a run.
        told: whether the runtime knows all of them before.
    """
    count, given = len(times), times if told else None
    at = [Place.of(times[: index + 1], given, count) for index in range(count)]

    @cache
    def computed(places: Places) -> Places:
        schedule = Schedule(1, 1, 1.0, Plan.of(count, places))
        had: list[int] = []
        for index, place in enumerate(at):
            if schedule.decide(dataclasses.replace(place, had=had))[0]:
                had.append(index)
        return tuple(had)

    return computed


def _missed(times: Sequence[float], places: Places) -> Tensor:
    """What each step misses, as weights of the dense path's moves: float64 [E - 1, E - 1].

    What the runtime would do with predictions that are unit vectors, one a step.
    """
    count, computed, unit = len(times) - 1, frozenset((0, *places)), time_unit(times)
    units, history = torch.eye(count).unsqueeze(1), History(1, 1, torch.device("cpu"))
    correction: Correction | None = None
    missed = []
    for index, (now, due) in enumerate(itertools.pairwise(times)):
        exact = units[index : index + 1]
        if index in computed:
            answer = exact + _lacking(history, correction, now, due, exact)
        else:
            answer = forecast("linear", history, now, unit)
        newest = history.computed[0]
        correction = correction or Correction.none(newest)
        correction.hand_out(newest, answer, now)
        correction.settle(1.0, due - now)
        missed.append((due - now) * (answer - exact).flatten())
    return torch.stack(missed).double()


def _lacking(
    history: History, correction: Correction | None, now: float, due: float, exact: Tensor
) -> Tensor | float:
    """What goes on top of a prediction that was computed."""
    before, older = (*history.computed[:2], None, None)[:2]
    history.record_dense(now, exact)
    if correction is None or before is None:
        return 0.0
    return on_top(correction.collect(before, older, history.computed[0]), 1.0, due - now)
