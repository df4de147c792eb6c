"""Search: the fewest dense evaluations, and where, whose score will do. It knows no models."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from specdiff.tuning.places import Places, Proposals, spaced

GAIN = 2.5e-4
"""Least gain in score that a move must bring, as a share of the target: 0.01 dB of 40."""


class Spent(Exception):
    """The budget is used up."""


@dataclass
class Search:
    """The fewest dense evaluations, and where, whose score reaches the target.

    Deterministic. Begins with places that may be good, as few as reach the target; then each time
    removes the place that costs least, or proposes anew, and moves single places to their
    neighbours as long as that gains. Where a guess is at hand, what it likes best is scored first.
    """

    evaluations: int
    score: Callable[[Places], float]
    """Of some places; may raise `Spent`."""
    target: float
    guess: Callable[[Places], float] | None = None
    """How good places may be, in any unit that rises with the score; costs nothing. Without one
    places are spaced by a power law."""
    best: Places = ()
    best_score: float = math.inf
    _known: dict[Places, float] = field(default_factory=dict)
    _proposals: Proposals = field(init=False)

    def __post_init__(self) -> None:
        self._proposals = Proposals(self.evaluations, self.guess)

    def run(self) -> None:
        """Find `best`; all evaluations if nothing reaches the target."""
        self.best = tuple(range(self.evaluations))
        with contextlib.suppress(Spent):
            self._fewest()
            while len(self.best) > 2 and self._with_one_fewer():
                pass
            self._climb(self.best, math.inf)

    def _fewest(self) -> None:
        """Narrow down the number of proposed places."""
        low, high = 1, self.evaluations
        while high - low > 1:
            middle = self._between(low, high)
            if self._score(self._proposals.of(middle)) >= self.target:
                high = middle
            else:
                low = middle

    def _between(self, low: int, high: int) -> int:
        """A number of places, above `low` and below `high`, that may be the least that will do.

        In the middle, unless guesses of two numbers that were scored tell how the score rises.
        """
        guesses, ends = self._proposals.values, [self._proposals.of(n) for n in (low, high)]
        if low not in guesses or not all(places in self._known for places in ends):
            return (low + high) // 2
        score, above = (self._known[places] for places in ends)
        share = (self.target - score) / (above - score)
        wanted = guesses[low] + share * (guesses[high] - guesses[low])
        return next((n for n in range(low + 1, high - 1) if guesses[n] >= wanted), high - 1)

    def _with_one_fewer(self) -> bool:
        fewer = len(self.best) - 1
        removed = _with_one_removed(self.best)
        if self.guess is not None:
            removed = [max(removed, key=self.guess)]
        starts = [self._proposals.of(fewer), spaced(self.evaluations, fewer), *removed]
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

    def _neighbours(self, places: Places) -> list[Places]:
        """With one place moved by one, the latest places first, or by the guess."""
        found = list(_with_one_moved(places, self.evaluations))
        return found if self.guess is None else sorted(found, key=self.guess, reverse=True)

    def _score(self, places: Places) -> float:
        if places not in self._known:
            self._known[places] = self.score(places)
        score = self._known[places]
        if score >= self.target and (-len(places), score) > (-len(self.best), self.best_score):
            self.best, self.best_score = places, score
        return score


def _with_one_moved(places: Places, evaluations: int) -> Iterator[Places]:
    for index in range(len(places) - 1, 0, -1):
        for step in (-1, 1):
            moved = places[index] + step
            shifted = tuple(sorted({*places[:index], moved, *places[index + 1 :]}))
            if 0 < moved < evaluations and len(shifted) == len(places):
                yield shifted


def _with_one_removed(places: Places) -> list[Places]:
    return [places[:index] + places[index + 1 :] for index in range(len(places) - 1, 0, -1)]
