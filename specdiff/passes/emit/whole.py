"""Whole: write the programs that compute every token, from the normalized graph.

    program    computes                        caches             returns
    probe      every token                     none               token-level output
    dense      every token                     overwritten        token-level output, importance
    selective  K active tokens (`rows`)        rows updated       the same; importance if wanted
    timetable  tables by time, or one row      tables filled      nothing
    tail       what follows the slots          none               the graph's own outputs

For example, where k is cached and y a slot, the dense program:

    before                                   after
    k   = linear(x)                          k     = linear(x);  cache_k.copy_(k)
    y   = head(attention(q, k, v))           y     = head(attention(q, k, v))
    out = unpatchify(y)                      return y, importance
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import fx

from specdiff.passes.emit.importance import ImportanceSum
from specdiff.passes.emit.own_call import own_call
from specdiff.passes.graph.dependence import ancestors
from specdiff.passes.graph.writer import GraphWriter
from specdiff.passes.rules.attention import ATTENTION, OWN_CALL, Attention
from specdiff.passes.rules.registry import shape_of
from specdiff.passes.rules.row_results import row_result, row_results
from specdiff.passes.select.cache_layout import encode, stored_tensors
from specdiff.passes.select.selection import Selection
from specdiff.program import TIMES_AT_ONCE

aten = torch.ops.aten


class WholeEmitter(GraphWriter):
    """Emits every value whole.

    `sample` is the number of rows of each attention that importance is measured from; 0: none.
    If `numbered`, the last input is the number of the model's attentions before this block.
    """

    def __init__(
        self, module: fx.GraphModule, selection: Selection, sample: int, numbered: bool = False
    ) -> None:
        super().__init__(module)
        self.selection = selection
        self.measures = sample > 0
        self.numbered = numbered and self.measures
        self.whole: dict[fx.Node, fx.Node] = {}
        self.importance = ImportanceSum(self, selection, sample)
        self._called: dict[str, fx.Node] = {}

    def call(self, target: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
        """Write one op; one with several results is called once for all that are needed."""
        if target is not row_result:
            return super().call(target, *args, **kwargs)
        op, place, *how = args
        key = repr((op, how, kwargs))
        if key not in self._called:
            self._called[key] = super().call(row_results, op, *how, **kwargs)
        return super().call(operator.getitem, self._called[key], place)

    def add_inputs(self) -> None:
        """Add a placeholder for each input of the traced graph."""
        for node in self.selection.axes.graph.find_nodes(op="placeholder"):
            self.whole[node] = self.copy_placeholder(node)

    def add_caches(self) -> dict[fx.Node, tuple[fx.Node, ...]]:
        """Add placeholders for each value that is stored between steps."""
        return {
            node: tuple(self.add_cache(node, t.suffix, t.shape, t.dtype) for t in tensors)
            for node, tensors in stored_tensors(self.selection).items()
        }

    def add_number(self) -> None:
        """Add the last placeholder, if `numbered`."""
        if self.numbered:
            like = self.selection.cached[0]
            self.importance.before = self.add_tensor("before", (1,), like, torch.int64)

    def emit_whole(self, node: fx.Node) -> None:
        """Write `node` with whole operands."""
        if node.target is not ATTENTION:
            self.whole[node] = self.copy(node, self.whole)
            return
        attention = Attention.of(node)
        query, key, value = (
            self.whole[each] for each in (attention.query, attention.key, attention.value)
        )
        mask = self.whole[attention.mask] if attention.mask is not None else None
        if OWN_CALL in node.meta:
            self.follow(node)
            self.whole[node] = own_call(self, node.meta[OWN_CALL], query, key, value)
        else:
            self.whole[node] = self.copy(node, self.whole)
        self.importance.observe(attention, query, key, mask)

    def finish(self, tokens: fx.Node) -> fx.GraphModule:
        """The program that returns the token-level output, and importance if measured."""
        return self._finish(tokens)

    def finish_block(self) -> fx.GraphModule:
        """The program that returns the graph's own outputs, and importance if measured."""
        return self._finish(*self.results())

    def _finish(self, *values: Any) -> fx.GraphModule:
        measured = (self.importance.result(),) if self.measures else ()
        self.graph.output((*values, *measured))
        return self.to_module()

    def results(self) -> tuple[Any, ...]:
        """The graph's own outputs, all whole."""
        return tuple(fx.map_arg(self.selection.axes.results(), lambda node: self.whole[node]))


def emit_probe(module: fx.GraphModule, selection: Selection) -> fx.GraphModule:
    """A program that computes the token-level output and nothing else."""
    emitter = WholeEmitter(module, selection, 0)
    _emit_whole(emitter, False, selection.slots)
    return emitter.finish(to_tokens(emitter, selection, emitter.whole))


def emit_dense(module: fx.GraphModule, selection: Selection, sample: int) -> fx.GraphModule:
    """A program that computes every token; the caches follow the inputs and are overwritten."""
    emitter = WholeEmitter(module, selection, sample)
    _emit_whole(emitter, True, selection.slots)
    return emitter.finish(to_tokens(emitter, selection, emitter.whole))


def emit_block_probe(module: fx.GraphModule, selection: Selection) -> fx.GraphModule:
    """The probe of one block of a model: it returns the graph's own outputs."""
    emitter = WholeEmitter(module, selection, 0)
    _emit_whole(emitter, False, tuple(selection.axes.outputs()))
    return emitter.finish_block()


def emit_block_dense(module: fx.GraphModule, selection: Selection, sample: int) -> fx.GraphModule:
    """The dense program of one block: it returns the graph's own outputs, and importance."""
    emitter = WholeEmitter(module, selection, sample, numbered=True)
    _emit_whole(emitter, True, tuple(selection.axes.outputs()))
    return emitter.finish_block()


def _emit_whole(emitter: WholeEmitter, fill: bool, targets: tuple[fx.Node, ...]) -> None:
    selection = emitter.selection
    emitter.add_inputs()
    caches = emitter.add_caches() if fill else {}
    emitter.add_number()
    for node in ancestors(*targets):
        if node.op != "placeholder":
            emitter.emit_whole(node)
        if node in caches and node not in selection.tabulated:
            value = emitter.whole[node]
            if node not in selection.fixed:
                value = emitter.permute(value, selection.cache_order(node))
            stored = encode(emitter, value, selection.codes.get(node))
            for cache, part in zip(caches[node], stored, strict=True):
                emitter.call(aten.copy_.default, cache, part)


def emit_timetable(module: fx.GraphModule, selection: Selection) -> fx.GraphModule:
    """A program that fills the tables; inputs: the graph's, the caches, TIMES_AT_ONCE times."""
    emitter, timetable = WholeEmitter(module, selection, 0), selection.timetable
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


def emit_timetable_row(module: fx.GraphModule, selection: Selection) -> fx.GraphModule:
    """A program that fills the first row of the tables; inputs: the graph's, the caches."""
    emitter = WholeEmitter(module, selection, 0)
    emitter.add_inputs()
    tables = emitter.add_caches()
    for node in ancestors(*selection.tabulated):
        if node.op != "placeholder":
            emitter.emit_whole(node)
        if node in selection.tabulated:
            row = emitter.call(aten.select.int, tables[node][0], 0, 0)
            emitter.call(aten.copy_.default, row, emitter.whole[node])
    emitter.graph.output(())
    return emitter.to_module()


def emit_tail(module: fx.GraphModule, selection: Selection) -> fx.GraphModule:
    """A program from inputs and token-level output [B, N, C] to the graph's outputs."""
    emitter = WholeEmitter(module, selection, 0)
    emitter.add_inputs()
    tokens = emitter.add_tensor(
        "tokens", (selection.axes.samples, selection.tokens, selection.channels), selection.slots[0]
    )
    emitter.whole.update(from_tokens(emitter, selection, tokens))
    for node in ancestors(*selection.axes.outputs(), known=emitter.whole):
        emitter.emit_whole(node)
    return emitter.finish_block()


def to_tokens(
    writer: GraphWriter, selection: Selection, values: Mapping[fx.Node, fx.Node]
) -> fx.Node:
    """The slots' values as one [B, tokens, C]: one after another, padded to the widest."""
    parts = []
    for slot in selection.slots:
        part = writer.permute(values[slot], selection.cache_order(slot))
        shape = shape_of(part)
        channels = prod(shape[2:])
        if len(shape) != 3:
            part = writer.call(aten.reshape.default, part, [*shape[:2], channels])
        if channels < selection.channels:
            part = writer.call(
                aten.constant_pad_nd.default, part, [0, selection.channels - channels]
            )
        parts.append(part)
    if len(parts) == 1:
        return parts[0]
    return writer.call(aten.cat.default, parts, 1)


def from_tokens(
    writer: GraphWriter, selection: Selection, tokens: fx.Node
) -> dict[fx.Node, fx.Node]:
    """The slots' values, cut out of [B, N, C]."""
    if len(selection.slots) == 1:
        return {selection.slots[0]: _unfolded(writer, selection, selection.slots[0], tokens)}
    values, start = {}, 0
    for slot in selection.slots:
        _, length, *rest = selection.cache_shape(slot)
        part = writer.call(aten.slice.Tensor, tokens, 1, start, start + length)
        part = writer.call(aten.slice.Tensor, part, 2, 0, prod(rest))
        values[slot] = _unfolded(writer, selection, slot, part)
        start += length
    return values


def _unfolded(writer: GraphWriter, selection: Selection, slot: fx.Node, part: fx.Node) -> fx.Node:
    shape = selection.cache_shape(slot)
    if len(shape) != 3:
        part = writer.call(aten.reshape.default, part, list(shape))
    return writer.permute(part, inverse(selection.cache_order(slot)))


def inverse(order: list[int]) -> list[int]:
    """The permutation that undoes `order`."""
    return [order.index(axis) for axis in range(len(order))]
