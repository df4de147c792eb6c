"""Times: which rows of tables hold the values of which time, and which times will come.

A pipeline's times cannot be told in advance, for a model takes them in a form of its own. But the
next generation mostly has those of the last one: inputs that were seen are kept, and tables are
filled for what followed then. A row is taken only for its own time: of times that a session gave
this is checked on the device, without waiting for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from specdiff.program import TIMES_AT_ONCE, Programs
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
                self._inputs, self._next = {}, {}
            self._inputs[moment] = value.clone()
        if previous is not None and previous != moment:
            self._next[previous] = moment

    def following(self, moment: Moment, count: int) -> dict[Moment, Tensor]:
        """Up to `count` time inputs that came after that of a moment, in their order."""
        found: dict[Moment, Tensor] = {}
        later = self._next.get(moment)
        while later is not None and later != moment and later not in found and len(found) < count:
            value = self._inputs.get(later)
            if value is None:
                break
            found[later] = value
            later = self._next.get(later)
        return found


class Timetable:
    """Which rows of one stream's tables hold the values of which moments."""

    def __init__(self) -> None:
        self._rows: dict[Moment, int] = {}
        self._inputs: list[Tensor] = []
        self._sources: StreamKey | None = None
        self._latest: Moment | None = None

    def look_up(
        self,
        programs: Programs,
        inputs: Sequence[object],
        caches: Sequence[Tensor],
        moment: Moment,
        known: KnownTimes,
    ) -> int | None:
        """The row with the values of a moment, filled if there is none; None of graphs without.

        Values are made anew where weights or scalars have changed, or may have. Times that a
        session gave say what the model's input is if that is a single number.
        """
        signature = programs.signature
        if not signature.tabulates:
            return None
        time = signature.time_input(inputs)
        sources = [inputs[index] for index in signature.tabulated_from]
        if moment[0] is not None and not is_one_number(time):
            self._fill(programs, inputs, caches, {moment: time.clone()}, sources)
            return 0
        known.see(moment, time, self._latest)
        self._latest = moment
        changed = self._sources is not None and not self._sources.is_unchanged(sources)
        if changed or moment not in self._rows:
            # what changes from step to step would make rows for later steps in vain
            later = {} if changed else known.following(moment, TIMES_AT_ONCE - 1)
            self._fill(programs, inputs, caches, {moment: time.clone(), **later}, sources)
        return self._rows[moment]

    def checked(self, tokens: Tensor, row: int, time: Tensor) -> Tensor:
        """`tokens`, all NaN if a row was made for another time input than this.

        Decided on the device: where times are not read, nothing waits for it.
        """
        same = (time == self._inputs[row]).all().to(tokens.device, non_blocking=True)
        return torch.where(same, tokens, torch.nan)

    def _fill(
        self,
        programs: Programs,
        inputs: Sequence[object],
        caches: Sequence[Tensor],
        times: Mapping[Moment, Tensor],
        sources: Sequence[object],
    ) -> None:
        self._rows = {moment: row for row, moment in enumerate(times)}
        self._inputs = list(times.values())
        self._sources = StreamKey(sources, keep_values=False)
        programs.tabulate(inputs, caches, self._inputs[1:])


def is_one_number(time: Tensor) -> bool:
    """Whether all elements of a time input share one place in memory: it is expanded, or alone."""
    pairs = zip(time.shape, time.stride(), strict=True)
    return all(size == 1 or stride == 0 for size, stride in pairs)
