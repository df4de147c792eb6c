"""What functionalization leaves of in-place writes: allocations, copies and scattered slices."""

from __future__ import annotations

import torch
from torch import fx

from specdiff.passes.rules.registry import (
    Facts,
    Link,
    argument,
    axis_index,
    is_tensor,
    operand_at,
    rank_of,
    same_axes,
    shape_of,
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
    """As many positions along every axis as the operand has; its values are not read."""
    return same_axes(node, operand_at(node, 0))


@transfer(aten.copy.default)
def copy(node: fx.Node) -> Facts:
    """The destination's axes; those of the source by broadcasting."""
    links = [Link(axis, operand_at(node, 0), axis) for axis in range(rank_of(node))]
    source = node.args[1]
    if is_tensor(source):
        shift = rank_of(node) - rank_of(source)
        links += [
            Link(axis + shift, source, axis)
            for axis, size in enumerate(shape_of(source))
            if size == shape_of(node)[axis + shift]
        ]
    return Facts(tuple(links))


@transfer(aten.slice_scatter.default)
def slice_scatter(node: fx.Node) -> Facts:
    """Every axis of the destination, and of the source all but the one written in part."""
    destination, source = operand_at(node, 0), operand_at(node, 1)
    if shape_of(source) == shape_of(node):
        return same_axes(node, source)
    dim = axis_index(argument(node, 2, "dim", 0), rank_of(node))
    written = [Link(a, source, a) for a in range(rank_of(node)) if a != dim]
    kept = same_axes(node, destination, skip=(dim,))
    return Facts((*kept.links, *written))


@transfer(aten.select_scatter.default)
def select_scatter(node: fx.Node) -> Facts:
    """The destination's axes but the one written in part, which the source lacks."""
    destination, source = operand_at(node, 0), operand_at(node, 1)
    dim = axis_index(argument(node, 2, "dim"), rank_of(node))
    written = [Link(a + (a >= dim), source, a) for a in range(rank_of(source))]
    return Facts((*same_axes(node, destination, skip=(dim,)).links, *written))
