"""Symbolic shapes: one Dynamo graph, one runtime for each concrete shape it is called with.

Numbers that Dynamo has made inputs, such as an adapter's strength once it has changed, are
constants of such a runtime, too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from torch import Tensor

Answer = Callable[..., Any]
Found = TypeVar("Found")
MAX_SHAPES = 16
"""Shapes that are remembered, each with programs and caches of its own."""
MAX_VALUES = 8
"""Sets of numbers that anything is compiled for: as many as Dynamo's variants of one function."""


class PerShape:
    """Answers a graph whose sizes Dynamo left symbolic, without adding a guard on any of them.

    Args:
        symbolic: positions of inputs that have symbolic sizes or are sizes themselves.
        floats: positions of Python floats, passed as tensors on the CPU.
        specialise: makes what answers calls with inputs of these concrete shapes.
        changing: answers calls once there have been too many sets of numbers.
    """

    def __init__(
        self,
        symbolic: Sequence[int],
        floats: Sequence[int],
        specialise: Callable[[Sequence[object]], Answer],
        changing: Answer,
    ) -> None:
        self._symbolic = tuple(symbolic)
        self._floats = tuple(floats)
        self._specialise = specialise
        self._changing = changing
        self._values: set[tuple[float, ...]] = set()
        self._answers: dict[Hashable, Answer] = {}

    def __call__(self, *inputs: object) -> Any:
        """The graph's outputs."""
        sizes = [_size(inputs[index]) for index in self._symbolic]
        values = tuple(float(inputs[index]) for index in self._floats)  # type: ignore[arg-type]
        if values not in self._values and len(self._values) == MAX_VALUES:
            return self._changing(*inputs)
        self._values.add(values)
        key = (*sizes, *values)
        if key not in self._answers:
            remember(self._answers, key, self._specialise(inputs), MAX_SHAPES)
        return self._answers[key](*inputs)


def remember(known: dict[Hashable, Found], key: Hashable, value: Found, limit: int) -> None:
    """Keep `value`, and of what was kept before at most the `limit - 1` newest."""
    while len(known) >= limit:
        del known[next(iter(known))]
    known[key] = value


def _size(value: object) -> Hashable:
    if isinstance(value, Tensor):
        # the stride of an axis of one is arbitrary
        return tuple(
            (n, s if n > 1 else 0) for n, s in zip(value.shape, value.stride(), strict=True)
        )
    return value
