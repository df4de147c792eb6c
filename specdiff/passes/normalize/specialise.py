"""Specialise: turn a Dynamo graph with symbolic sizes into one for calls of one shape.

Dynamo keeps its one symbolic graph and adds no guard; the passes see a static graph for each shape.
Under dynamic shapes Dynamo also passes Python floats, even constants such as the epsilon of a norm,
as float64 tensors on the CPU whose `item()` the graph takes. They become constants again:

    before                                 after
    norm(x, eps.item())                    norm(x, 1e-06)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx


def floats_of(module: fx.GraphModule) -> tuple[int, ...]:
    """Positions of inputs that are Python floats to the model."""
    nodes = module.graph.find_nodes(op="placeholder")
    return tuple(i for i, node in enumerate(nodes) if _is_float(node))


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    scalar = isinstance(value, torch.Tensor) and value.dtype is torch.float64 and not value.dim()
    return scalar and all(user.target == "item" for user in node.users)


def specialise(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    copy_graph: Callable[[fx.GraphModule], fx.GraphModule],
) -> fx.GraphModule:
    """A copy of the graph in which the floats of these real inputs are constants."""
    positions = floats_of(module)
    copied = copy_graph(module)
    nodes = copied.graph.find_nodes(op="placeholder")
    for position in positions:
        value = inputs[position].item()
        for user in list(nodes[position].users):
            user.replace_all_uses_with(value)
            copied.graph.erase_node(user)
    copied.recompile()
    return copied
