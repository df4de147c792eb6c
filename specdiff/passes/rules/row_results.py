"""Row results: a row-wise op as a function of values whose tokens are an axis of their own.

Kernels write to operands, return several tensors, and take samples, tokens and heads as one axis.
In a graph each of their results is a node, on operands that nothing is merged in:

    q [B * N, H, D] = rope_(q, positions [B * N], table)
    q [B, N, H, D]  = row_result(rope_, 0, ("q",), "q", {"q": (2, 1), "positions": (2,)}, {},
                                 q=q [B, N, H, D], positions=positions [B, N], table=table)

What is here is plain Python on tensors: compiled programs see the op itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from specdiff.passes.rules.registry import Facts, Link, is_tensor, shape_of, transfer

Groups = tuple[int, ...]
"""How many axes become each axis that the op gets: (1, 2) makes [B, N, H, D] [B, N * H, D]."""
Fresh = tuple[tuple[int, ...], torch.dtype]
"""Of a tensor that the op fills: its axes behind the merged ones, and its dtype."""


def row_results(
    op: Any,
    results: Sequence[str | int],
    like: str,
    merged: Mapping[str, Groups],
    fresh: Mapping[str, Fresh],
    /,
    **arguments: Any,
) -> tuple[Tensor, ...]:
    """Call an op; no operand is written to.

    Args:
        op: the op.
        results: what is wanted: numbers of what it returns, names of what it writes to.
        like: the operand that has all rows; results get their axes back from it.
        merged: the operands that go by rows, and which of their axes the op gets as one.
        fresh: what the op fills without reading it; it is in `results`, not in `arguments`.
        arguments: all others, by name.
    """
    groups = merged[like]
    rows = arguments[like].shape[: sum(groups)]
    given = dict(arguments)
    for name, axes in merged.items():
        value = arguments[name]
        shape = (*_products(value.shape, axes), *value.shape[sum(axes) :])
        given[name] = value.reshape(shape).contiguous()  # kernels rely on it
        if name in results:
            given[name] = given[name].clone()
    for name, (rest, dtype) in fresh.items():
        shape = (*_products(rows, groups), *rest)
        given[name] = arguments[like].new_empty(shape, dtype=dtype)
    returned = op(**given)
    returned = returned if isinstance(returned, list | tuple) else (returned,)
    values = [given[key] if isinstance(key, str) else returned[key] for key in results]
    return tuple(value.reshape(*rows, *value.shape[len(groups) :]) for value in values)


def row_result(
    op: Any, place: int, results: Sequence[str | int], /, *how: Any, **by: Any
) -> Tensor:
    """The one of `row_results` at this place; each node of a graph is one tensor."""
    return row_results(op, results, *how, **by)[place]


def _products(shape: Sequence[int], groups: Groups) -> list[int]:
    sizes, start = [], 0
    for count in groups:
        sizes.append(prod(shape[start : start + count]))
        start += count
    return sizes


@transfer(row_result)
def rows(node: fx.Node) -> Facts:
    """The axes that rows lie along, counted from the front; what an operand has once is shared."""
    merged: Any = node.args[4]
    links, out = [], shape_of(node)
    for name, groups in merged.items():
        operand = node.kwargs[name]
        if is_tensor(operand):
            axes = enumerate(zip(shape_of(operand)[: sum(groups)], out, strict=False))
            links += [Link(axis, operand, axis) for axis, (size, full) in axes if size == full]
    return Facts(tuple(links))
