"""Search: the fewest dense evaluations, and where, whose score will do. It knows no models."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

Places = tuple[int, ...]
"""Indices of the dense evaluations, rising from 0."""
TAPER = 1.25
"""How spaced places grow apart: place i of d at (i / (d - 1)) ** TAPER of the way."""
GAIN = 2.5e-4
"""Least gain in score that a move must bring, as a share of the target: 0.01 dB of 40."""


class Spent(Exception):
    """The budget is used up."""


@dataclass
class Search:
    """The fewest dense evaluations, and where, whose score reaches the target.

    Deterministic. Begins with places spaced by a power law, as few as reach the target; then each
    time removes the place that costs least, or spaces anew, and moves single places to their
    neighbours as long as that gains.
    """

    evaluations: int
    score: Callable[[Places], float]
    """Of some places; may raise `Spent`."""
    target: float
    best: Places = ()
    best_score: float = math.inf
    _known: dict[Places, float] = field(default_factory=dict)

    def run(self) -> None:
        """Find `best`; all evaluations if nothing reaches the target."""
        self.best = tuple(range(self.evaluations))
        with contextlib.suppress(Spent):
            self._spaced()
            while len(self.best) > 2 and self._with_one_fewer():
                pass
            self._climb(self.best, math.inf)

    def _spaced(self) -> None:
        """Bisect the number of spaced places."""
        low, high = 1, self.evaluations
        while high - low > 1:
            middle = (low + high) // 2
            if self._score(spaced(self.evaluations, middle)) >= self.target:
                high = middle
            else:
                low = middle

    def _with_one_fewer(self) -> bool:
        fewer = len(self.best) - 1
        starts = [spaced(self.evaluations, fewer), *_with_one_removed(self.best)]
        return self._climb(max(starts, key=self._score), self.target) >= self.target

    def _climb(self, places: Places, target: float) -> float:
        """Move places while that gains, until the target is reached."""
        score, moved = self._score(places), True
        least = GAIN * abs(self.target)
        while moved and score < target:
            moved = False
            for neighbour in self._neighbours(places):
                if (rival := self._score(neighbour)) > score + least:
                    places, score, moved = neighbour, rival, True
                    break
        return score

    def _neighbours(self, places: Places) -> Iterator[Places]:
        """With one place moved by one, the latest places first."""
        for index in range(len(places) - 1, 0, -1):
            for step in (-1, 1):
                moved = places[index] + step
                shifted = tuple(sorted({*places[:index], moved, *places[index + 1 :]}))
                if 0 < moved < self.evaluations and len(shifted) == len(places):
                    yield shifted

    def _score(self, places: Places) -> float:
        if places not in self._known:
            self._known[places] = self.score(places)
        score = self._known[places]
        if score >= self.target and (-len(places), score) > (-len(self.best), self.best_score):
            self.best, self.best_score = places, score
        return score


def spaced(evaluations: int, count: int) -> Places:
    """So many places, further and further apart, the first and (from two on) the last included."""
    last = evaluations - 1
    ideal = [last * (i / max(count - 1, 1)) ** TAPER for i in range(count)]
    placed: list[int] = []
    for index, place in enumerate(ideal):
        low, high = placed[-1] + 1 if placed else 0, last - (count - 1 - index)
        placed.append(min(max(round(place), low), high))
    return tuple(placed)


def _with_one_removed(places: Places) -> list[Places]:
    return [places[:index] + places[index + 1 :] for index in range(len(places) - 1, 0, -1)]
