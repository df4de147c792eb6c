"""Keys: what tells one set of conditions from another, by identity or by value."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence

import torch
from torch import Tensor


class StreamKey:
    """What tells streams apart: the conditions, by identity and state, or by value if asked."""

    def __init__(self, conditions: Sequence[object], *, keep_values: bool) -> None:
        self._marks = [_mark(condition) for condition in conditions]
        self._kept = list(conditions) if keep_values else None

    def forget_values(self) -> None:
        """Know the conditions by identity alone from here on."""
        self._kept = None

    def differing(self, conditions: Sequence[object], assumed: Collection[int]) -> frozenset[int]:
        """Positions of conditions that are neither the same object, unmodified, nor equal.

        Reads the device where kept tensors are compared.

        Args:
            conditions: of a call.
            assumed: positions at which another object is taken to differ without reading it.
        """
        return frozenset(
            i
            for i, condition in enumerate(conditions)
            if not _is_marked(condition, *self._marks[i])
            and (i in assumed or not self._is_equal_at(i, condition))
        )

    def _is_equal_at(self, index: int, condition: object) -> bool:
        if self._kept is None:
            return False
        kept = self._kept[index]
        return _is_marked(kept, *self._marks[index]) and _equal(kept, condition)

    @property
    def alive(self) -> bool:
        """Whether a call can still match: no tensor has died, or the values were kept."""
        return all(ref() is not None for ref, _ in self._marks if isinstance(ref, weakref.ref))

    def is_same(self, conditions: Sequence[object]) -> bool:
        """Whether these are the same objects, unmodified since."""
        return all(
            _is_marked(condition, *mark)
            for mark, condition in zip(self._marks, conditions, strict=True)
        )


class Conditions:
    """The conditions of a stream's calls: some stand, others vary from call to call.

    Args:
        first: of its first call.
    """

    def __init__(self, first: Sequence[object]) -> None:
        self.key = StreamKey(first, keep_values=True)
        """Of the latest call."""
        self.varying: frozenset[int] = frozenset()
        """Positions of those that the latest call had changed."""
        self.news = False
        """Whether a condition changed that had stood still."""

    def stand(self, keep_values: bool) -> None:
        """The present call has the same objects."""
        if not keep_values:
            self.key.forget_values()
        self.news, self.varying = False, frozenset()

    def change(self, conditions: Sequence[object], changed: frozenset[int]) -> None:
        """The present call goes on with others, changed at these positions."""
        self.key = StreamKey(conditions, keep_values=True)
        self.news = not changed <= self.varying
        self.varying = changed


State = tuple[int | None, int | None]
"""Version and address of a tensor: a write in place moves one, `tensor.data = other` the other."""


def _state(tensor: Tensor) -> State:
    # Inference tensors track no version: their writes in place cannot be seen.
    version = None if tensor.is_inference() else tensor._version
    return version, tensor.data_ptr() if is_plain(tensor) else None


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has an address: subclasses and sparse tensors may have none."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided


def _mark(condition: object) -> tuple[object, State | None]:
    if isinstance(condition, Tensor):
        return weakref.ref(condition), _state(condition)
    return condition, None


def _is_marked(condition: object, mark: object, state: State | None) -> bool:
    if isinstance(condition, Tensor):
        same = isinstance(mark, weakref.ref) and mark() is condition
        return same and state == _state(condition)
    return bool(mark == condition)


def _equal(kept: object, condition: object) -> bool:
    if isinstance(kept, Tensor) and isinstance(condition, Tensor):
        return torch.equal(kept, condition)
    return type(kept) is type(condition) and kept == condition
