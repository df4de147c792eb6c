"""Emit: write the programs of a plan as graphs, by re-interpreting the normalized one.

Four programs come from one plan: *probe* (every token, no cache), *dense* (every token, caches
overwritten), *selective* (K active tokens, cache rows updated in place) and *tail* (the outputs
from the token-level output). The first three return (token-level output, importance).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from specdiff.passes.importance import ImportanceSum
from specdiff.passes.rules.attention import ATTENTION, Attention
from specdiff.passes.rules.registry import shape_of
from specdiff.passes.selective import SelectivePlan, cache_order, cache_shape
from specdiff.passes.writer import GraphWriter

aten = torch.ops.aten


class WholeEmitter(GraphWriter):
    """Emits every value whole."""

    def __init__(self, module: fx.GraphModule, plan: SelectivePlan, sample: int) -> None:
        super().__init__(module)
        self.plan = plan
        self.whole: dict[fx.Node, fx.Node] = {}
        self.importance = ImportanceSum(self, plan, sample)

    def add_inputs(self) -> None:
        """One placeholder for each input of the traced graph."""
        for node in self.plan.axes.graph.find_nodes(op="placeholder"):
            self.whole[node] = self.copy_placeholder(node)

    def emit_whole(self, node: fx.Node) -> None:
        """`node` with whole operands."""
        self.whole[node] = self.copy(node, self.whole)
        if node.target is ATTENTION:
            found = Attention.of(node)
            mask = self.whole[found.mask] if found.mask is not None else None
            self.importance.observe(found, self.whole[found.query], self.whole[found.key], mask)

    def finish(self, tokens: fx.Node) -> fx.GraphModule:
        """Return token-level output and importance."""
        self.graph.output((tokens, self.importance.result()))
        return self.to_module()


def emit_dense(
    module: fx.GraphModule, plan: SelectivePlan, sample: int, fill: bool
) -> fx.GraphModule:
    """Probe (`fill` false) or dense (`fill` true: caches follow the inputs and are overwritten)."""
    emitter = WholeEmitter(module, plan, sample)
    emitter.add_inputs()
    caches = {}
    if fill:
        caches = {node: emitter.add_cache(cache_shape(plan, node), node) for node in plan.cached}
    for node in _needed(plan.slot):
        if node.op != "placeholder":
            emitter.emit_whole(node)
        if node in caches:
            ordered = emitter.permute(emitter.whole[node], cache_order(plan, node))
            emitter.call(aten.copy_.default, caches[node], ordered)
    return emitter.finish(channels_last(emitter, plan, emitter.whole[plan.slot]))


def emit_tail(module: fx.GraphModule, plan: SelectivePlan) -> fx.GraphModule:
    """Inputs and token-level output [B, N, C] to the graph's outputs."""
    emitter = WholeEmitter(module, plan, 1)
    emitter.add_inputs()
    order = cache_order(plan, plan.slot)
    shape = cache_shape(plan, plan.slot)
    tokens = emitter.add_tensor("tokens", (*shape[:2], _product(shape[2:])), plan.slot)
    unfolded = emitter.call(aten.reshape.default, tokens, list(shape)) if len(shape) > 3 else tokens
    emitter.whole[plan.slot] = emitter.permute(unfolded, inverse(order))
    for node in _needed(*plan.axes.outputs(), known=emitter.whole):
        emitter.emit_whole(node)
    outputs = plan.axes.results()
    emitter.graph.output(fx.map_arg(outputs, lambda node: emitter.whole[node]))
    return emitter.to_module()


def _needed(*targets: fx.Node, known: Any = ()) -> list[fx.Node]:
    """Ancestors of `targets` that are not `known`, in graph order."""
    found: set[fx.Node] = set()
    pending = list(targets)
    while pending:
        node = pending.pop()
        if node not in found and node not in known:
            found.add(node)
            pending += node.all_input_nodes
    return [node for node in targets[0].graph.nodes if node in found]


def channels_last(writer: GraphWriter, plan: SelectivePlan, value: fx.Node) -> fx.Node:
    """The token-level output as [B, tokens, C]."""
    ordered = writer.permute(value, cache_order(plan, plan.slot))
    shape = shape_of(ordered)
    if len(shape) == 3:
        return ordered
    return writer.call(aten.reshape.default, ordered, [*shape[:2], _product(shape[2:])])


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def inverse(order: list[int]) -> list[int]:
    """The permutation that undoes `order`."""
    return [order.index(axis) for axis in range(len(order))]
