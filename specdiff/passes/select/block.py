"""Block: the selection for one block of a model that is compiled block by block.

A block has neither latent nor time, so the caller says which segment is prunable, by its number of
tokens and, where text has as many, by the argument that holds them. A block's outputs are whole:
rows of active tokens are fresh, the others are left from the last time they were computed. Only the
root's head reads those; the runtime replaces its result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import fx

from specdiff.errors import Unsupported
from specdiff.passes.rules.registry import is_tensor
from specdiff.passes.rules.shape import VIEWS
from specdiff.passes.select.axes import AxisFacts
from specdiff.passes.select.selection import Selection
from specdiff.program import NAME_TOKENS

aten = torch.ops.aten
AS_STRIDES_ARE = (*VIEWS, aten.clone.default, aten.contiguous.default, aten.alias.default)
"""Ops that a graph has or lacks depending on the strides of its inputs."""


def work_of(graph: fx.Graph) -> Hashable:
    """A fingerprint of a graph: how often each op occurs with which numbers, sizes left out."""
    work: Counter[Hashable] = Counter()
    for node in graph.nodes:
        if node.op == "call_function" and node.target not in AS_STRIDES_ARE:
            given = (*node.args, *node.kwargs.values())
            work[(node.target, *(v for v in given if isinstance(v, bool | float)))] += 1
    return frozenset(work.items())


def lengths_of(axes: AxisFacts) -> frozenset[int]:
    """Tokens of each segment of a block."""
    return frozenset(axes.classes.size(segment) for segment in axes.segments)


def returned_lengths(axes: AxisFacts) -> frozenset[int]:
    """Tokens of each segment that an output of a block has: text that only serves has none."""
    outputs = [node for node in axes.graph.output_node().all_input_nodes if is_tensor(node)]
    returned = [s for s in axes.segments if any(axes.axes_with(node, s) for node in outputs)]
    return frozenset(axes.classes.size(segment) for segment in returned)


def lengths_held(axes: AxisFacts, names: Sequence[str]) -> Mapping[str, frozenset[int]]:
    """By the name of each input: tokens of each segment that it holds."""
    inputs = zip(names, axes.graph.find_nodes(op="placeholder"), strict=True)
    tensors = {name: node for name, node in inputs if is_tensor(node)}
    return {
        name: frozenset(axes.classes.size(s) for s in axes.segments if _is_stream(axes, node, s))
        for name, node in tensors.items()
    }


def select_block(
    axes: AxisFacts, tokens: int, is_state: Sequence[bool], holder: int | None = None
) -> Selection:
    """The selection in which the one segment with this many tokens is prunable.

    `is_state[i]` says whether input i is a parameter or buffer; `holder` is the input that holds
    the segment, if it is known. Raises Unsupported unless exactly one segment has this length, or
    if the block mixes the tokens of an input before any attention: it would read rows that are out
    of date.
    """
    placeholders = axes.graph.find_nodes(op="placeholder")
    matching = [s for s in axes.segments if axes.classes.size(s) == tokens]
    if holder is not None:
        matching = [s for s in matching if _is_stream(axes, placeholders[holder], s)]
    if len(matching) != 1:
        found = f"{len(matching)} segments of a block have {tokens} tokens, not one"
        raise Unsupported(f"{found}; {NAME_TOKENS}" if len(matching) > 1 else found)
    (segment,) = matching
    inputs = zip(placeholders, is_state, strict=True)
    streams = [
        node
        for node, state in inputs
        if not state and is_tensor(node) and _is_stream(axes, node, segment)
    ]
    selection = Selection(axes=axes, prunable=(segment,), stale=frozenset(streams)).with_needs()
    mixed = [node.name for node in streams if node in selection.whole]
    if mixed:
        raise Unsupported(f"a block mixes the tokens of its input {', '.join(mixed)}")
    if not selection.cached:
        raise Unsupported("no attention of a block reads the prunable tokens")
    return selection


def _is_stream(axes: AxisFacts, node: fx.Node, segment: int) -> bool:
    return bool(axes.axes_with(node, segment)) and axes.batch_axis(node) is not None
