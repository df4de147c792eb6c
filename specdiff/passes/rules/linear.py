"""Ops that mix or reduce channels and leave the other axes alone."""

from __future__ import annotations

import torch
from torch import fx

from specdiff.passes.rules.registry import (
    Facts,
    Link,
    argument,
    axis_index,
    operand_at,
    rank_of,
    same_axes,
    transfer,
)
from specdiff.quantized import LINEAR

aten = torch.ops.aten


LINEARS = (aten.linear.default, LINEAR)
"""The second with a quantised weight."""


@transfer(*LINEARS)
def linear(node: fx.Node) -> Facts:
    """All axes but the last."""
    return same_axes(node, operand_at(node, 0), skip=(-1,))


@transfer(aten.layer_norm.default, aten.rms_norm.default)
def norm(node: fx.Node) -> Facts:
    """All axes but the normalized ones."""
    normalized = len(argument(node, 1, "normalized_shape"))
    return same_axes(node, operand_at(node, 0), skip=tuple(range(-normalized, 0)))


@transfer(aten.softmax.int, aten._softmax.default, aten.log_softmax.int)
def softmax(node: fx.Node) -> Facts:
    """All axes but the one that sums to one."""
    return same_axes(node, operand_at(node, 0), skip=(argument(node, 1, "dim"),))


@transfer(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default)
def reduction(node: fx.Node) -> Facts:
    """All axes but the reduced ones; those get size one or vanish."""
    operand = operand_at(node, 0)
    rank = rank_of(operand)
    dims = argument(node, 1, "dim") or list(range(rank))
    dims = {axis_index(d, rank) for d in ([dims] if isinstance(dims, int) else dims)}
    unreduced = [axis for axis in range(rank) if axis not in dims]
    keepdim = argument(node, 2, "keepdim", False)
    return Facts(
        tuple(Link(axis if keepdim else i, operand, axis) for i, axis in enumerate(unreduced))
    )


@transfer(aten.embedding.default)
def embedding(node: fx.Node) -> Facts:
    """The axes of the indices; each index picks a row of the table."""
    indices = operand_at(node, 1)
    return Facts(tuple(Link(axis, indices, axis) for axis in range(rank_of(indices))))


@transfer(aten.index_select.default, aten.argsort.default, aten.glu.default)
def along_one_axis(node: fx.Node) -> Facts:
    """All axes but the one that the op works along."""
    return same_axes(node, operand_at(node, 0), skip=(argument(node, 1, "dim", -1),))
