"""Symbolic shapes: one Dynamo graph, one runtime for each concrete shape it is called with."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor

Answer = Callable[..., Any]
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
            while len(self._answers) >= MAX_SHAPES:
                del self._answers[next(iter(self._answers))]
            self._answers[key] = self._specialise(inputs)
        return self._answers[key](*inputs)


def _size(value: object) -> Hashable:
    if isinstance(value, Tensor):
        # the stride of an axis of one is arbitrary
        return tuple(
            (n, s if n > 1 else 0) for n, s in zip(value.shape, value.stride(), strict=True)
        )
    return value
