"""Times: which tables hold what the model makes of a time, and which times will come.

A pipeline's times cannot be told in advance, for a model takes them in a form of its own. But the
next generation has the times of the last one: each input that was seen is kept, and when tables are
filled, they are filled for the times that followed then. What is looked up is never guessed: a row
is taken only for the very time that it was made for.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from specdiff.runtime.keys import StreamKey

Moment = tuple[tuple[float, ...] | None, float]
"""(all times of the run if the session gave them, time): tells one input of time from another."""
MOST_KNOWN = 1024


class KnownTimes:
    """Time inputs of the selective steps of a graph, and which came after which."""

    def __init__(self) -> None:
        self._inputs: dict[Moment, Tensor] = {}
        self._next: dict[Moment, Moment] = {}

    def see(self, moment: Moment, value: Tensor, previous: Moment | None) -> None:
        """Keep a time input, and that it came after `previous` in its generation."""
        if moment not in self._inputs:
            if len(self._inputs) >= MOST_KNOWN:
                self._inputs.clear()
                self._next.clear()
            self._inputs[moment] = value.clone()
        if previous is not None and previous != moment:
            self._next[previous] = moment

    def following(self, moment: Moment, count: int) -> list[Moment]:
        """`moment`, which was seen, and up to `count - 1` that came after it."""
        found = [moment]
        while len(found) < count:
            later = self._next.get(found[-1])
            if later is None or later in found or later not in self._inputs:
                break
            found.append(later)
        return found

    def inputs(self, moments: Sequence[Moment]) -> list[Tensor]:
        """The time inputs of moments that were seen."""
        return [self._inputs[moment] for moment in moments]


class Timetable:
    """Which rows of one stream's tables hold the values of which moments."""

    def __init__(self) -> None:
        self._rows: dict[Moment, int] = {}
        self._scalars: StreamKey | None = None
        self.latest: Moment | None = None
        """That of the previous selective step."""

    def row(self, moment: Moment, scalars: Sequence[object]) -> int | None:
        """The row of a moment; None if there is none, or other scalars went along with it."""
        if self._scalars is None or not self._scalars.is_same(scalars):
            return None
        return self._rows.get(moment)

    def fill(self, moments: Sequence[Moment], scalars: Sequence[object]) -> None:
        """Note what the tables are about to hold."""
        self._rows = {moment: row for row, moment in enumerate(moments)}
        self._scalars = StreamKey(scalars, keep_values=False)
