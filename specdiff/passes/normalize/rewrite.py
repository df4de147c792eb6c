"""Rewrite: replace nodes of a traced graph by others with the same value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from specdiff import torch_adapter
from specdiff.passes.graph.writer import PROVENANCE, STRIDED_VIEWS
from specdiff.passes.rules.registry import operand_at, shape_of
from specdiff.passes.rules.shape import VIEWS

aten = torch.ops.aten
# these depend on how their operand is stored, so it must not be replaced
STORAGE_BOUND = (aten.view_as_complex.default, aten.view.dtype)


def collapse_views(graph: fx.Graph) -> set[fx.Node]:
    """Replace a view of a view by one view, or by the base itself if it has the same shape.

    Axes that were merged and split again are thereby the same axes again. Returns the new values
    whose strides differ from those of the values that they replace.
    """
    moved: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.target not in VIEWS or any(u.target in STORAGE_BOUND for u in node.users):
            continue
        base = operand_at(node, 0)
        if base.target not in VIEWS:
            continue
        while base.target in VIEWS:
            base = operand_at(base, 0)
        moved |= replace(node, reshaped(node, base, shape_of(node)))
    return moved


def reshaped(before: fx.Node, value: fx.Node, shape: Sequence[int]) -> fx.Node:
    """`value` in this shape: the value itself, or a new node before `before`."""
    if shape_of(value) == tuple(shape):
        return value
    return call(before, aten.reshape.default, value, list(shape))


def call(before: fx.Node, target: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
    """A new node before `before`, evaluated, with the provenance of `before`."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    node.meta.update({key: before.meta[key] for key in PROVENANCE if key in before.meta})
    _evaluate(node, torch_adapter.fake_mode_of(before.meta["val"]))
    return node


def _evaluate(node: fx.Node, mode: Any) -> None:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
    with mode, torch.no_grad():
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def replace(old: fx.Node, new: fx.Node) -> set[fx.Node]:
    """Use `new` instead of `old`; return {new} if its strides differ, else nothing."""
    moved = new.meta["val"].stride() != old.meta["val"].stride()
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
    return {new} if moved else set()


def refresh(graph: fx.Graph, moved: set[fx.Node]) -> None:
    """Evaluate again what depends on `moved`: strides follow, and some views become reshapes."""
    modes = [torch_adapter.fake_mode_of(node.meta["val"]) for node in moved]
    for node in graph.nodes:
        if node.op != "call_function" or moved.isdisjoint(node.all_input_nodes):
            continue
        if node.target in STRIDED_VIEWS:
            node.target = aten.reshape.default
        old = node.meta["val"]
        _evaluate(node, modes[0])
        if not isinstance(old, torch.Tensor) or node.meta["val"].stride() != old.stride():
            moved.add(node)
