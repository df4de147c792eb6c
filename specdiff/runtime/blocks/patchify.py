"""Patches: a model's output as tokens and back, told from shapes alone.

Only for models that are compiled block by block, whose head no graph shows. Tokens are taken to lie
in row-major order over frames, rows and columns, as every patch embedding of diffusers has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

SIZES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Patches:
    """An output [B, N, C], or [B, C, *grid] in patches of `patch` positions along each axis."""

    shape: tuple[int, ...]
    patch: tuple[int, ...]
    """Empty where the output is a list of tokens."""

    @property
    def tokens(self) -> int:
        """N."""
        return prod(self._grid) if self.patch else self.shape[1]

    @property
    def _grid(self) -> tuple[int, ...]:
        return tuple(n // p for n, p in zip(self.shape[2:], self.patch, strict=True))

    def split(self, output: Tensor) -> Tensor:
        """[B, N, C] of an output."""
        if not self.patch:
            return output
        sizes = [n for pair in zip(self._grid, self.patch, strict=True) for n in pair]
        cut = output.reshape(*self.shape[:2], *sizes)
        count = len(self.patch)
        grid, inside = range(2, 2 + 2 * count, 2), range(3, 3 + 2 * count, 2)
        return cut.permute(0, *grid, *inside, 1).reshape(self.shape[0], self.tokens, -1)

    def join(self, tokens: Tensor) -> Tensor:
        """The output of [B, N, C]."""
        if not self.patch:
            return tokens
        count = len(self.patch)
        cut = tokens.reshape(self.shape[0], *self._grid, *self.patch, self.shape[1])
        order = [axis for i in range(count) for axis in (1 + i, 1 + count + i)]
        return cut.permute(0, 1 + 2 * count, *order).reshape(self.shape)


def possible(shape: Sequence[int], lengths: frozenset[int]) -> Iterator[Patches]:
    """The ways to see an output as one of these numbers of tokens, image patches square."""
    shape = tuple(shape)
    if len(shape) == 3 and shape[1] in lengths:
        yield Patches(shape, ())
    if len(shape) not in (4, 5):
        return
    frames = SIZES[:3] if len(shape) == 5 else (0,)
    for frame in frames:
        for size in SIZES:
            patch = (frame, size, size) if frame else (size, size)
            if any(n % p for n, p in zip(shape[2:], patch, strict=True)):
                continue
            if Patches(shape, patch).tokens in lengths:
                yield Patches(shape, patch)
