"""Ops over neighbourhoods: convolution, pooling, padding, shifts. They mix spatial axes."""

from __future__ import annotations

import torch
from torch import fx

from specdiff.passes.graph.python_file import op_name
from specdiff.passes.rules.registry import (
    Facts,
    Link,
    Part,
    argument,
    operand_at,
    rank_of,
    same_axes,
    shape_of,
    transfer,
)

aten = torch.ops.aten


CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.convolution.default,
)


SHUFFLES = (aten.pixel_shuffle.default, aten.pixel_unshuffle.default)


@transfer(
    *CONVOLUTIONS,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
def convolution(node: fx.Node) -> Facts:
    """The batch axis alone; an unbatched input has none."""
    operand, weight = operand_at(node, 0), operand_at(node, 1)
    if rank_of(operand) != rank_of(weight):
        return Facts()
    return Facts((Link(0, operand, 0),))


@transfer(
    aten.group_norm.default,
    aten.native_group_norm.default,
    *SHUFFLES,
)
def channels_mixed(node: fx.Node) -> Facts:
    """The batch axis alone; an unbatched input has none."""
    operand = operand_at(node, 0)
    if node.target in SHUFFLES and rank_of(operand) != 4:
        return Facts()
    return Facts((Link(0, operand, 0),))


@transfer(
    aten.upsample_nearest1d.default,
    aten.upsample_nearest2d.default,
    aten.upsample_nearest3d.default,
    aten.upsample_nearest1d.vec,
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest3d.vec,
    aten.upsample_bilinear2d.vec,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.avg_pool3d.default,
)
def resampled(node: fx.Node) -> Facts:
    """Batch axis and channels; no facts for an unbatched input."""
    operand = operand_at(node, 0)
    spatial = next(n for n in (1, 2, 3) if f"{n}d" in op_name(node.target))
    if rank_of(operand) != spatial + 2:
        return Facts()
    return Facts((Link(0, operand, 0), Link(1, operand, 1)))


@transfer(aten.cumsum.default, aten.cumprod.default)
def accumulated(node: fx.Node) -> Facts:
    """All axes but the one along which values accumulate."""
    return same_axes(node, operand_at(node, 0), skip=(argument(node, 1, "dim"),))


@transfer(aten.roll.default, aten.flip.default)
def moved(node: fx.Node) -> Facts:
    """All axes but those along which values move."""
    dims = argument(node, 2 if node.target is aten.roll.default else 1, "dims", ())
    if not dims:
        return Facts()  # a roll without axes runs over all of them
    return same_axes(node, operand_at(node, 0), skip=tuple(dims))


@transfer(aten.constant_pad_nd.default, aten.pad.default)
def pad(node: fx.Node) -> Facts:
    """Axes that are not padded; of an axis that only grows the operand is a part."""
    operand, amounts = operand_at(node, 0), argument(node, 1, "pad")
    rank = rank_of(node)
    padded = {rank - 1 - i // 2: amounts[i] for i in range(0, len(amounts), 2)}
    changed = {axis for axis in padded if shape_of(node)[axis] != shape_of(operand)[axis]}
    changed |= {axis for axis, before in padded.items() if before}
    grown = node.target is aten.constant_pad_nd.default or argument(node, 2, "mode") == "constant"
    parts = [
        Part((node, axis), (operand, axis), padded[axis])
        for axis in sorted(changed)
        if grown and padded[axis] >= 0 and _room(node, operand, axis, padded[axis])
    ]
    return Facts(same_axes(node, operand, skip=tuple(changed)).links, tuple(parts))


def _room(node: fx.Node, operand: fx.Node, axis: int, before: int) -> bool:
    return before + shape_of(operand)[axis] <= shape_of(node)[axis]


@transfer(aten.repeat.default)
def repeat(node: fx.Node) -> Facts:
    """Axes that are taken once."""
    operand, times = operand_at(node, 0), argument(node, 1, "repeats")
    shift = len(times) - rank_of(operand)
    return Facts(
        tuple(
            Link(axis + shift, operand, axis)
            for axis in range(rank_of(operand))
            if times[axis + shift] == 1
        )
    )
