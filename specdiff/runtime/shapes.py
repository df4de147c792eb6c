"""Symbolic shapes: one Dynamo graph, one runtime for each concrete shape it is called with."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from torch import Tensor

Answer = Callable[..., Any]
Found = TypeVar("Found")
MAX_SHAPES = 16
"""Shapes that are remembered, each with programs and caches of its own."""


class PerShape:
    """Answers a graph whose sizes Dynamo left symbolic, without adding a guard on any of them.

    Args:
        symbolic: positions of inputs that have symbolic sizes or are sizes themselves.
        floats: positions of Python floats, passed as tensors on the CPU.
        specialise: makes what answers calls with inputs of these concrete shapes.
    """

    def __init__(
        self,
        symbolic: Sequence[int],
        floats: Sequence[int],
        specialise: Callable[[Sequence[object]], Answer],
    ) -> None:
        self._symbolic = tuple(symbolic)
        self._floats = tuple(floats)
        self._specialise = specialise
        self._answers: dict[Hashable, Answer] = {}

    def __call__(self, *inputs: object) -> Any:
        """The graph's outputs."""
        sizes = [_size(inputs[index]) for index in self._symbolic]
        key = (*sizes, *(float(inputs[index]) for index in self._floats))  # type: ignore[arg-type]
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
