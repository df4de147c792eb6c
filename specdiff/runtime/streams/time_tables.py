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

from specdiff.program import TIMES_AT_ONCE, Programs, Signature
from specdiff.runtime.streams.keys import StreamKey

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
        if moment not in self._inputs and len(self._inputs) >= MOST_KNOWN:
            self._inputs, self._next = {}, {}
        self._inputs[moment] = value.clone()
        if previous is not None and previous != moment:
            self._next[previous] = moment

    def following(self, moment: Moment, count: int) -> dict[Moment, Tensor]:
        """Up to `count` time inputs that came after that of a moment, in their order."""
        inputs: dict[Moment, Tensor] = {}
        later = self._next.get(moment)
        while later is not None and later != moment and later not in inputs and len(inputs) < count:
            value = self._inputs.get(later)
            if value is None:
                break
            inputs[later] = value
            later = self._next.get(later)
        return inputs


class TableRows:
    """Which rows of one stream's tables hold the values of which moments."""

    def __init__(self) -> None:
        self._made_for: dict[Moment, tuple[int, Tensor]] = {}
        """Rows, and the time inputs that they were made for."""
        self._scalars: Scalars | None = None
        self._weights: StreamKey | None = None
        self._latest: Moment | None = None

    def look_up(
        self,
        programs: Programs,
        inputs: Sequence[object],
        caches: Sequence[Tensor],
        moment: Moment,
        known: KnownTimes,
    ) -> int | None:
        """The row with the values of a moment, filled if there is none; None of graphs without."""
        signature, sources = programs.signature, programs.signature.tabulated_from
        if sources is None:
            return None
        time, scalars = signature.time_input(inputs), tensors(inputs, sources.scalars)
        # a session tells one time a sample, and nothing of times of each frame or token
        told = moment[0] is None or time.numel() <= signature.batch
        changed = self._scalars is not None and not self._scalars.are(scalars, moment[0] is None)
        if told:
            known.see(moment, time, self._latest)
            self._latest = moment
        if not told or changed or moment not in self._made_for:
            # scalars that change from step to step would make rows for later steps in vain
            later = known.following(moment, TIMES_AT_ONCE - 1) if told and not changed else {}
            self._made_for = enumerated({moment: time.clone(), **later})
            self._scalars = Scalars(scalars)
            self._weights = StreamKey(tensors(inputs, sources.weights), keep_values=False)
            programs.tabulate(inputs, caches, [*later.values()])
        return self._made_for[moment][0]

    def checked(
        self, tokens: Tensor, signature: Signature, inputs: Sequence[object], moment: Moment
    ) -> Tensor:
        """`tokens`, all NaN if the row of a moment was made for another time or other scalars.

        Decided on the device: where times are not read, nothing waits for it.
        """
        assert self._scalars is not None and signature.tabulated_from is not None
        scalars = tensors(inputs, signature.tabulated_from.scalars)
        pairs = [(signature.time_input(inputs), self._made_for[moment][1])]
        pairs += zip(scalars, self._scalars.values, strict=True)
        for now, then in pairs:
            same = (now == then).all().to(tokens.device, non_blocking=True)
            tokens = torch.where(same, tokens, torch.nan)
        return tokens

    def renew(self, signature: Signature, inputs: Sequence[object]) -> None:
        """Forget what was made of other weights; for dense steps, which make all anew."""
        sources = signature.tabulated_from
        if sources is None or self._weights is None:
            return
        if not self._weights.is_same(tensors(inputs, sources.weights)):
            self._made_for, self._scalars, self._weights = {}, None, None


class Scalars:
    """Inputs of a number a sample that went into tables."""

    def __init__(self, scalars: Sequence[Tensor]) -> None:
        self.values = [scalar.clone() for scalar in scalars]
        self._key = StreamKey(scalars, keep_values=False)

    def are(self, scalars: Sequence[Tensor], readable: bool) -> bool:
        """Whether these are the same; where devices are read anyway, by value if need be."""
        hidden = any(scalar.is_inference() for scalar in scalars)  # no version tells of a write
        if self._key.is_same(scalars) and not (hidden and readable):
            return True
        return readable and all(map(torch.equal, scalars, self.values))


def tensors(inputs: Sequence[object], indices: Sequence[int]) -> list[Tensor]:
    """Those of the inputs."""
    values = (inputs[index] for index in indices)
    return [value for value in values if isinstance(value, Tensor)]


def enumerated(times: Mapping[Moment, Tensor]) -> dict[Moment, tuple[int, Tensor]]:
    """Each time input with its place."""
    return {moment: (row, time) for row, (moment, time) in enumerate(times.items())}
