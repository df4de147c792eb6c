"""Joining: several calls of a model made one, along the batch, and its output taken apart again.

    call of A   hidden_states [2, 64, 16], timestep [2], img_ids [64, 3]     2 rows
    call of B   hidden_states [1, 64, 16], timestep [1], img_ids [64, 3]     1 row
    joined      hidden_states [3, 64, 16], timestep [3], img_ids [64, 3]

A tensor, or a list, that has an entry for each row of its call is joined. Everything else must be
equal. Nothing is padded: calls of other shapes are joined with others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from specdiff.runtime.blocks.row_parts import taken


@dataclass(frozen=True)
class Call:
    """One call of a model, which has `rows` rows."""

    rows: int
    leaves: tuple[Any, ...]
    form: pytree.TreeSpec


def is_list(value: object) -> bool:
    """Lists are kept whole: they may hold an entry for each row."""
    return isinstance(value, list)


def call_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """The call with these arguments; the first of them that is a batch is the latent."""
    leaves, form = pytree.tree_flatten((tuple(args), dict(kwargs)), is_leaf=is_list)
    batches = [each for each in leaves if _is_batch(each)]
    return Call(len(batches[0]) if batches else 1, tuple(leaves), form)


def joinable(one: Call, other: Call) -> bool:
    """Whether the calls can be made one."""
    if one.form != other.form:
        return False
    return all(
        _fit(a, b, one.rows, other.rows) for a, b in zip(one.leaves, other.leaves, strict=True)
    )


def joined(calls: Sequence[Call]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of one call, for calls that are joinable; a single one stays as it is."""
    first, *others = calls
    leaves = list(first.leaves)
    if others:
        rows = [call.rows for call in calls]
        columns = zip(*(call.leaves for call in calls), strict=True)
        leaves = [_join(column, rows) for column in columns]
    args, kwargs = pytree.tree_unflatten(leaves, first.form)
    return args, kwargs


def parted(output: Any, rows: Sequence[int]) -> list[Any]:
    """The output of each call, of that of the joined one."""
    if len(rows) == 1:
        return [output]
    places = pairwise([0, *accumulate(rows)])
    return [taken(output, range(begin, end), sum(rows)) for begin, end in places]


def _is_batch(leaf: object) -> bool:
    if isinstance(leaf, Tensor):
        return leaf.ndim > 2 and leaf.is_floating_point()
    return isinstance(leaf, list) and bool(leaf) and all(isinstance(e, Tensor) for e in leaf)


def _has_rows(leaf: object, rows: int) -> bool:
    if isinstance(leaf, Tensor):
        return leaf.ndim == 0 or len(leaf) == rows
    return isinstance(leaf, list) and len(leaf) == rows


def _fit(a: Any, b: Any, rows: int, other_rows: int) -> bool:
    if _has_rows(a, rows) and _has_rows(b, other_rows):
        return isinstance(a, list) or (
            (a.shape[1:], a.dtype, a.device) == (b.shape[1:], b.dtype, b.device)
            and a.ndim == b.ndim
        )
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return (
            isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
            and torch.equal(a, b)
        )
    if isinstance(a, list) or isinstance(b, list):
        return False  # of no length known: what its entries stand for is not known either
    return type(a) is type(b) and bool(a == b)


def _join(column: Sequence[Any], rows: Sequence[int]) -> Any:
    first = column[0]
    if not all(_has_rows(leaf, count) for leaf, count in zip(column, rows, strict=True)):
        return first
    if isinstance(first, list):
        return [entry for leaf in column for entry in leaf]
    if first.ndim == 0:  # one time for all rows of each call
        column = [leaf.expand(count) for leaf, count in zip(column, rows, strict=True)]
    return torch.cat(list(column))
