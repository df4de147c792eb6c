"""Ops that only rearrange: views, permutations, slices, joins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import fx

from specdiff.passes.rules.registry import (
    Facts,
    Link,
    Part,
    argument,
    axis_index,
    broadcast_links,
    operand_at,
    operands_at,
    rank_of,
    same_axes,
    shape_of,
    start_of,
    transfer,
)

aten = torch.ops.aten

VIEWS = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)


def aligned_axes(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Pairs (old axis, new axis) that a row-major reshape does not mix with others.

    Axes that are merged or split belong to no pair; a size of one pairs only with a size of one.
    """
    i = j = 0
    while i < len(old) and j < len(new):
        if old[i] == new[j]:
            yield i, j
            i, j = i + 1, j + 1
        elif old[i] == 1:
            i += 1
        elif new[j] == 1:
            j += 1
        else:
            i, j = _skip_mixed(old, new, i, j)


def _skip_mixed(old: Sequence[int], new: Sequence[int], i: int, j: int) -> tuple[int, int]:
    left, right = old[i], new[j]
    while left != right:
        if left < right:
            i += 1
            left *= old[i]
        else:
            j += 1
            right *= new[j]
    return i + 1, j + 1


@transfer(*VIEWS)
def view(node: fx.Node) -> Facts:
    """Axes that are neither merged nor split."""
    operand = operand_at(node, 0)
    if 0 in shape_of(node):
        return Facts()
    pairs = aligned_axes(shape_of(operand), shape_of(node))
    return Facts(tuple(Link(new, operand, old) for old, new in pairs))


@transfer(aten.permute.default)
def permute(node: fx.Node) -> Facts:
    """Axis i comes from axis dims[i]."""
    operand, dims = operand_at(node, 0), argument(node, 1, "dims")
    rank = rank_of(node)
    return Facts(tuple(Link(i, operand, axis_index(d, rank)) for i, d in enumerate(dims)))


@transfer(aten.transpose.int)
def transpose(node: fx.Node) -> Facts:
    """Two axes change places."""
    operand = operand_at(node, 0)
    rank = rank_of(node)
    order = list(range(rank))
    first, second = (axis_index(argument(node, i, f"dim{i - 1}"), rank) for i in (1, 2))
    order[first], order[second] = second, first
    return Facts(tuple(Link(i, operand, axis) for i, axis in enumerate(order)))


@transfer(aten.unsqueeze.default)
def unsqueeze(node: fx.Node) -> Facts:
    """A new axis of size one."""
    operand = operand_at(node, 0)
    dim = axis_index(argument(node, 1, "dim"), rank_of(node))
    return Facts(tuple(Link(a + (a >= dim), operand, a) for a in range(rank_of(operand))))


@transfer(aten.squeeze.dim, aten.select.int)
def drop_axis(node: fx.Node) -> Facts:
    """One axis vanishes. No facts for a squeeze without effect: `normalize` removes those."""
    operand = operand_at(node, 0)
    if rank_of(node) == rank_of(operand):
        return Facts()
    dim = axis_index(argument(node, 1, "dim"), rank_of(operand))
    return Facts(
        tuple(Link(a - (a > dim), operand, a) for a in range(rank_of(operand)) if a != dim)
    )


@transfer(aten.expand.default)
def expand(node: fx.Node) -> Facts:
    """Axes aligned from the right that keep their size."""
    return Facts(tuple(broadcast_links(node, operand_at(node, 0))))


@transfer(aten.repeat_interleave.self_int)
def repeat_interleave(node: fx.Node) -> Facts:
    """All axes but the repeated one."""
    dim = argument(node, 2, "dim")
    return Facts() if dim is None else same_axes(node, operand_at(node, 0), skip=(dim,))


@transfer(aten.slice.Tensor)
def slice_(node: fx.Node) -> Facts:
    """The sliced axis is a part; the other axes are the same."""
    operand = operand_at(node, 0)
    dim = axis_index(argument(node, 1, "dim", 0), rank_of(node))
    if shape_of(node) == shape_of(operand):
        return same_axes(node, operand)
    facts = same_axes(node, operand, skip=(dim,))
    if argument(node, 4, "step", 1) != 1:
        return facts
    offset = start_of(node, 2, shape_of(operand)[dim])
    return Facts(facts.links, (Part((operand, dim), (node, dim), offset),))


@transfer(aten.cat.default)
def cat(node: fx.Node) -> Facts:
    """Operands are parts along the joined axis; the other axes are the same."""
    operands = operands_at(node, 0)
    dim = axis_index(argument(node, 1, "dim", 0), rank_of(node))
    links: list[Link] = []
    parts = []
    offset = 0
    for operand in operands:
        # an empty one-dimensional operand is legal and joins nothing
        if rank_of(operand) != rank_of(node):
            return Facts()
        links += [Link(a, operand, a) for a in range(rank_of(node)) if a != dim]
        parts.append(Part((node, dim), (operand, dim), offset))
        offset += shape_of(operand)[dim]
    return Facts(tuple(links), tuple(parts))


@transfer(aten.stack.default)
def stack(node: fx.Node) -> Facts:
    """Operands gain a new axis."""
    dim = axis_index(argument(node, 1, "dim", 0), rank_of(node))
    links = [
        Link(a + (a >= dim), operand, a)
        for operand in operands_at(node, 0)
        for a in range(rank_of(operand))
    ]
    return Facts(tuple(links))


@transfer(aten.view_as_complex.default, aten.view_as_real.default)
def complex_pair(node: fx.Node) -> Facts:
    """All axes but the one that holds real and imaginary part."""
    operand = operand_at(node, 0)
    shared = min(rank_of(node), rank_of(operand))
    return Facts(tuple(Link(axis, operand, axis) for axis in range(shared)))
