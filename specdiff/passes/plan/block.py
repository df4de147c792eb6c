"""Block: the plan of one block of a model that is compiled block by block.

A block has neither latent nor time: which of its segments is prunable is said from outside, by the
number of its tokens. Its outputs are whole: rows of active tokens are fresh, the others are those
last computed, which nothing reads but the root's own head, whose output is merged by the runtime.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from torch import fx

from specdiff.errors import Unsupported
from specdiff.passes.plan.axes import AxisFacts
from specdiff.passes.plan.selective_plan import SelectivePlan
from specdiff.passes.rules.registry import is_tensor
from specdiff.passes.rules.shape import VIEWS

aten = torch.ops.aten
AS_STRIDES_ARE = (*VIEWS, aten.clone.default, aten.contiguous.default, aten.alias.default)
"""Which of these a graph has depends on the strides of its inputs."""


def work_of(graph: fx.Graph) -> Hashable:
    """What a graph computes: each op, with its numbers but for sizes, as often as it occurs."""
    work: Counter[Hashable] = Counter()
    for node in graph.nodes:
        if node.op == "call_function" and node.target not in AS_STRIDES_ARE:
            given = (*node.args, *node.kwargs.values())
            work[(node.target, *(v for v in given if isinstance(v, bool | float)))] += 1
    return frozenset(work.items())


def plan_block(axes: AxisFacts, tokens: int, states: Sequence[bool]) -> SelectivePlan:
    """The plan in which the one segment of this many tokens is prunable.

    `states[i]` says whether input i is a parameter or buffer. Raises Unsupported if no segment or
    several have this length, or if an input is mixed over its tokens before any attention: its
    inactive rows would be read.
    """
    found = [s for s in axes.segments if axes.classes.size(s) == tokens]
    if len(found) != 1:
        raise Unsupported(f"{len(found)} segments of a block have {tokens} tokens, not one")
    inputs = zip(axes.graph.find_nodes(op="placeholder"), states, strict=True)
    streams = [
        node
        for node, state in inputs
        if not state and is_tensor(node) and _is_stream(axes, node, found[0])
    ]
    plan = SelectivePlan(axes=axes, prunable=(found[0],), stale=frozenset(streams)).replan()
    mixed = [node.name for node in streams if node in plan.whole]
    if mixed:
        raise Unsupported(f"a block mixes the tokens of its input {', '.join(mixed)}")
    if not plan.cached:
        raise Unsupported("no attention of a block reads the prunable tokens")
    return plan


def _is_stream(axes: AxisFacts, node: fx.Node, segment: int) -> bool:
    return bool(axes.axes_with(node, segment)) and axes.batch_axis(node) is not None
