"""Places: where the dense evaluations of a plan lie, and proposals of where."""

from __future__ import annotations

from collections.abc import Callable, Iterator

Places = tuple[int, ...]
"""Indices of the dense evaluations, rising from 0."""
TAPER = 1.25
"""How spaced places grow apart: place i of d at (i / (d - 1)) ** TAPER of the way."""
FIRST = 3
"""Places that stay: what is lost early costs some pictures most, and a guess, or a few pictures, do
not tell which (examples/research/worst.md)."""
FEW = 2 * FIRST
"""Fewer places than these are spaced, whatever is guessed: too many of them would stay."""


class Proposals:
    """For each number of places where they may lie: by a guess, else spaced by a power law.

    By the guess, places go one by one, each time the one that is missed least; single places then
    go elsewhere as long as that gains. The `FIRST` and the last stay.
    """

    def __init__(self, evaluations: int, guess: Callable[[Places], float] | None) -> None:
        self._evaluations, self._guess = evaluations, guess
        self._found: dict[int, Places] = {}
        self._thinned = {} if guess is None else _thinned(evaluations, guess)
        self.values = {count: value for count, (_, value) in self._thinned.items()}
        """Guesses, by the number of places, before single places go elsewhere."""

    def of(self, count: int) -> Places:
        """So many places."""
        if self._guess is None or count not in self._thinned:
            return spaced(self._evaluations, count)
        if count not in self._found:
            places, value = self._thinned[count]
            self._found[count] = _exchanged(places, value, self._evaluations, self._guess)
        return self._found[count]


def _thinned(evaluations: int, guess: Callable[[Places], float]) -> dict[int, tuple[Places, float]]:
    places = tuple(range(evaluations))
    found = {evaluations: (places, guess(places))}
    while len(places) > FEW:
        fewer = (tuple(p for p in places if p != gone) for gone in _free(places))
        value, places = max((guess(each), each) for each in fewer)
        found[len(places)] = places, value
    return found


def _free(places: Places) -> Places:
    """Those that may go."""
    return tuple(place for place in places[:-1] if place >= FIRST)


def _exchanged(
    places: Places, value: float, evaluations: int, guess: Callable[[Places], float]
) -> Places:
    while True:
        rivals = [(guess(each), each) for each in _with_one_elsewhere(places, evaluations)]
        best, other = max(rivals, default=(value, places))
        if best <= value:
            return places
        value, places = best, other


def _with_one_elsewhere(places: Places, evaluations: int) -> Iterator[Places]:
    unused = sorted({*range(evaluations)} - {*places})
    for gone in _free(places):
        rest = {*places} - {gone}
        yield from (tuple(sorted((*rest, place))) for place in unused)


def spaced(evaluations: int, count: int) -> Places:
    """So many places, further and further apart, the first and (from two on) the last included."""
    last = evaluations - 1
    ideal = [last * (i / max(count - 1, 1)) ** TAPER for i in range(count)]
    placed: list[int] = []
    for index, place in enumerate(ideal):
        low, high = placed[-1] + 1 if placed else 0, last - (count - 1 - index)
        placed.append(min(max(round(place), low), high))
    return tuple(placed)
