"""In-place writes, as functionalization and `normalize` leave them: allocations, scatters."""

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

aten = torch.ops.aten


@transfer(
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
)
def allocation_like(node: fx.Node) -> Facts:
    """All axes: they have the operand's sizes, and its values are not read."""
    return same_axes(node, operand_at(node, 0))


@transfer(aten.slice_scatter.default)
def slice_scatter(node: fx.Node) -> Facts:
    """All axes but the one written with a stride; `normalize` rewrites all other writes."""
    destination, source = operand_at(node, 0), operand_at(node, 1)
    dim = axis_index(argument(node, 2, "dim", 0), rank_of(node))
    written = [Link(a, source, a) for a in range(rank_of(node)) if a != dim]
    unwritten = same_axes(node, destination, skip=(dim,))
    return Facts((*unwritten.links, *written))


@transfer(aten.select_scatter.default)
def select_scatter(node: fx.Node) -> Facts:
    """All axes of the destination but the one written in part; the source lacks that one."""
    destination, source = operand_at(node, 0), operand_at(node, 1)
    dim = axis_index(argument(node, 2, "dim"), rank_of(node))
    written = [Link(a + (a >= dim), source, a) for a in range(rank_of(source))]
    return Facts((*same_axes(node, destination, skip=(dim,)).links, *written))
