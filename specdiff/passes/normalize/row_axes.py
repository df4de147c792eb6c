"""Row axes: which axes a row-wise op gets merged, read off the views before and behind it.

q [B, N, H, D], seen by the op as [B, N * H, D]        axes [B, N, H], groups (1, 2)
x [B, N, C],    seen by the op as [B * N, C]           axes [B, N],    groups (2,)
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from specdiff.passes.rules.row_results import Groups


def split_axes(other: Sequence[int], seen: Sequence[int]) -> list[int] | None:
    """The axes of rows, of a value that a view makes `seen` of the shape `other`, or back.

    Axes of one that `other` has are kept: they may count samples. None if a border between axes
    of the one lies inside an axis of the other.
    """
    axes = _refined(other, seen)
    behind = 1
    while axes and behind != seen[-1]:
        behind *= axes.pop()
    return axes


def _refined(other: Sequence[int], seen: Sequence[int]) -> list[int] | None:
    """Each axis of both as a product of the axes returned."""
    axes, old, new = [], [*reversed(other)], [n for n in reversed(seen) if n != 1]
    while old:
        left = old.pop()
        if left == 1:
            axes.append(1)
            continue
        right = new.pop()
        size = min(left, right)
        if not size or max(left, right) % size:
            return None
        axes.append(size)
        old += [left // size] if left > size else []
        new += [right // size] if right > size else []
    return axes


def groups_of(axes: Sequence[int], seen: Sequence[int]) -> Groups | None:
    """How many of the axes make each axis that the op sees; None if they do not."""
    groups, start = [], 0
    for size in seen:
        stop = start + (size == 1 and axes[start : start + 1] == [1])
        while prod(axes[start:stop]) < size and stop < len(axes):
            stop += 1
        if prod(axes[start:stop]) != size:
            return None
        groups.append(stop - start)
        start = stop
    if not groups or prod(axes[start:]) != 1:
        return None
    groups[-1] += len(axes) - start
    return tuple(groups)
