"""Emit: write the programs of a plan as graphs, by re-interpreting the normalized one.

Programs come from one plan: *probe* (every token, no cache), *dense* (every token, caches
overwritten), *selective* (K active tokens, cache rows updated in place), *timetable* (the tables
that selective reads, or one row of them) and *tail* (the outputs from the token-level output).
Probe, dense and selective return the token-level output; dense, and selective where that is wanted,
importance too.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import fx

from specdiff.passes.emit.importance import ImportanceSum
from specdiff.passes.graph.dependence import ancestors
from specdiff.passes.graph.writer import GraphWriter
from specdiff.passes.plan.cache_layout import encode, kept_tensors
from specdiff.passes.plan.selective_plan import SelectivePlan
from specdiff.passes.rules.attention import ATTENTION, Attention
from specdiff.passes.rules.registry import shape_of
from specdiff.program import TIMES_AT_ONCE

aten = torch.ops.aten


class WholeEmitter(GraphWriter):
    """Emits every value whole.

    `sample`: rows of each attention that importance is taken from; 0: it is not measured.
    `numbered`: the last input says how many attentions of the model came before this block's.
    """

    def __init__(
        self, module: fx.GraphModule, plan: SelectivePlan, sample: int, numbered: bool = False
    ) -> None:
        super().__init__(module)
        self.plan = plan
        self.measures = sample > 0
        self.numbered = numbered and self.measures
        self.whole: dict[fx.Node, fx.Node] = {}
        self.importance = ImportanceSum(self, plan, sample)

    def add_inputs(self) -> None:
        """One placeholder for each input of the traced graph."""
        for node in self.plan.axes.graph.find_nodes(op="placeholder"):
            self.whole[node] = self.copy_placeholder(node)

    def add_caches(self) -> dict[fx.Node, tuple[fx.Node, ...]]:
        """The further placeholders of each value that is kept between steps."""
        return {
            node: tuple(self.add_cache(node, t.suffix, t.shape, t.dtype) for t in tensors)
            for node, tensors in kept_tensors(self.plan).items()
        }

    def add_number(self) -> None:
        """The last placeholder, if it is `numbered`."""
        if self.numbered:
            like = self.plan.cached[0]
            self.importance.before = self.add_tensor("before", (1,), like, torch.int64)

    def emit_whole(self, node: fx.Node) -> None:
        """`node` with whole operands."""
        self.whole[node] = self.copy(node, self.whole)
        if node.target is ATTENTION:
            found = Attention.of(node)
            mask = self.whole[found.mask] if found.mask is not None else None
            self.importance.observe(found, self.whole[found.query], self.whole[found.key], mask)

    def finish(self, tokens: fx.Node) -> fx.GraphModule:
        """Return token-level output, and importance if it is measured."""
        return self._finish(tokens)

    def finish_block(self) -> fx.GraphModule:
        """Return the graph's own outputs, all whole, and importance if it is measured."""
        return self._finish(*self.results())

    def _finish(self, *values: Any) -> fx.GraphModule:
        measured = (self.importance.result(),) if self.measures else ()
        self.graph.output((*values, *measured))
        return self.to_module()

    def results(self) -> tuple[Any, ...]:
        """The graph's own outputs, all whole."""
        return tuple(fx.map_arg(self.plan.axes.results(), lambda node: self.whole[node]))


def emit_probe(module: fx.GraphModule, plan: SelectivePlan) -> fx.GraphModule:
    """Every token and nothing else: the token-level output."""
    emitter = WholeEmitter(module, plan, 0)
    _emit_whole(emitter, False, plan.slots)
    return emitter.finish(to_tokens(emitter, plan, emitter.whole))


def emit_dense(module: fx.GraphModule, plan: SelectivePlan, sample: int) -> fx.GraphModule:
    """Every token; caches follow the inputs and are overwritten."""
    emitter = WholeEmitter(module, plan, sample)
    _emit_whole(emitter, True, plan.slots)
    return emitter.finish(to_tokens(emitter, plan, emitter.whole))


def emit_block_probe(module: fx.GraphModule, plan: SelectivePlan) -> fx.GraphModule:
    """Every token of one block of a model: the graph's own outputs."""
    emitter = WholeEmitter(module, plan, 0)
    _emit_whole(emitter, False, tuple(plan.axes.outputs()))
    return emitter.finish_block()


def emit_block_dense(module: fx.GraphModule, plan: SelectivePlan, sample: int) -> fx.GraphModule:
    """Dense for one block of a model: the graph's own outputs, and importance."""
    emitter = WholeEmitter(module, plan, sample, numbered=True)
    _emit_whole(emitter, True, tuple(plan.axes.outputs()))
    return emitter.finish_block()


def _emit_whole(emitter: WholeEmitter, fill: bool, targets: tuple[fx.Node, ...]) -> None:
    plan = emitter.plan
    emitter.add_inputs()
    caches = emitter.add_caches() if fill else {}
    emitter.add_number()
    for node in ancestors(*targets):
        if node.op != "placeholder":
            emitter.emit_whole(node)
        if node in caches and node not in plan.tabulated:
            value = emitter.whole[node]
            if node not in plan.fixed:
                value = emitter.permute(value, plan.cache_order(node))
            kept = encode(emitter, value, plan.codes.get(node))
            for cache, part in zip(caches[node], kept, strict=True):
                emitter.call(aten.copy_.default, cache, part)


def emit_timetable(module: fx.GraphModule, plan: SelectivePlan) -> fx.GraphModule:
    """Fills the tables; inputs are the graph's, the caches, and times, a further axis in front."""
    emitter, timetable = WholeEmitter(module, plan, 0), plan.timetable
    assert timetable is not None
    emitter.add_inputs()
    tables = emitter.add_caches()
    shape = (TIMES_AT_ONCE, *shape_of(timetable.time))
    times = emitter.add_tensor("times", shape, timetable.time)
    given: dict[fx.Node, fx.Node] = {**emitter.whole, timetable.time: times}
    for leaf in timetable.leaves:
        if leaf.op == "get_attr":
            given[leaf] = emitter.copy(leaf, {})
    values = emitter.inline(timetable.module.graph, [given[leaf] for leaf in timetable.leaves])
    for node, value in zip(timetable.values, values, strict=True):
        emitter.call(aten.copy_.default, tables[node][0], value)
    emitter.graph.output(())
    return emitter.to_module()


def emit_timetable_row(module: fx.GraphModule, plan: SelectivePlan) -> fx.GraphModule:
    """Fills the first row of the tables, for the time of the inputs, which the caches follow."""
    emitter = WholeEmitter(module, plan, 0)
    emitter.add_inputs()
    tables = emitter.add_caches()
    for node in ancestors(*plan.tabulated):
        if node.op != "placeholder":
            emitter.emit_whole(node)
        if node in plan.tabulated:
            row = emitter.call(aten.select.int, tables[node][0], 0, 0)
            emitter.call(aten.copy_.default, row, emitter.whole[node])
    emitter.graph.output(())
    return emitter.to_module()


def emit_tail(module: fx.GraphModule, plan: SelectivePlan) -> fx.GraphModule:
    """Inputs and token-level output [B, N, C] to the graph's outputs."""
    emitter = WholeEmitter(module, plan, 0)
    emitter.add_inputs()
    tokens = emitter.add_tensor(
        "tokens", (plan.axes.samples, plan.tokens, plan.channels), plan.slots[0]
    )
    emitter.whole.update(from_tokens(emitter, plan, tokens))
    for node in ancestors(*plan.axes.outputs(), known=emitter.whole):
        emitter.emit_whole(node)
    return emitter.finish_block()


def to_tokens(
    writer: GraphWriter, plan: SelectivePlan, values: Mapping[fx.Node, fx.Node]
) -> fx.Node:
    """The slots' values as one [B, tokens, C], one after another, channels padded to the widest."""
    parts = []
    for slot in plan.slots:
        part = writer.permute(values[slot], plan.cache_order(slot))
        shape = shape_of(part)
        channels = prod(shape[2:])
        if len(shape) != 3:
            part = writer.call(aten.reshape.default, part, [*shape[:2], channels])
        if channels < plan.channels:
            part = writer.call(aten.constant_pad_nd.default, part, [0, plan.channels - channels])
        parts.append(part)
    if len(parts) == 1:
        return parts[0]
    return writer.call(aten.cat.default, parts, 1)


def from_tokens(
    writer: GraphWriter, plan: SelectivePlan, tokens: fx.Node
) -> dict[fx.Node, fx.Node]:
    """The slots' values out of [B, N, C]."""
    if len(plan.slots) == 1:
        return {plan.slots[0]: _unfolded(writer, plan, plan.slots[0], tokens)}
    values, start = {}, 0
    for slot in plan.slots:
        _, length, *rest = plan.cache_shape(slot)
        part = writer.call(aten.slice.Tensor, tokens, 1, start, start + length)
        part = writer.call(aten.slice.Tensor, part, 2, 0, prod(rest))
        values[slot] = _unfolded(writer, plan, slot, part)
        start += length
    return values


def _unfolded(writer: GraphWriter, plan: SelectivePlan, slot: fx.Node, part: fx.Node) -> fx.Node:
    shape = plan.cache_shape(slot)
    if len(shape) != 3:
        part = writer.call(aten.reshape.default, part, list(shape))
    return writer.permute(part, inverse(plan.cache_order(slot)))


def inverse(order: list[int]) -> list[int]:
    """The permutation that undoes `order`."""
    return [order.index(axis) for axis in range(len(order))]
