"""Timetable: values that time alone moves are computed for many timesteps at once, and looked up.

The shifts, scales and gates of a diffusion transformer depend on the timestep and on conditions,
not on the latent. A step that computes few tokens spends a good part of itself on reading the
weights that make them. Here they are *tabulated*: a table has a row for each of `TIMES_AT_ONCE`
timesteps, filled in one go, and a selective step reads one row. Proved from the graph; a dense step
goes on computing them. What is cheap to make of them, such as 1 + scale, is made in each step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence, Set

from torch import Tensor, fx

from specdiff.errors import Unsupported
from specdiff.passes.base import Pass, PassError
from specdiff.passes.graph.dependence import ancestors, descendants
from specdiff.passes.plan.cost import Arithmetic
from specdiff.passes.plan.input_roles import VaryingInputs
from specdiff.passes.plan.selective_plan import SelectivePlan, Timetable
from specdiff.passes.rules.registry import is_tensor, operands, shape_of
from specdiff.program import TIMES_AT_ONCE

LEAST = 1e5
"""FLOPs a sample that a table saves, at least: it is one more input of every program."""
MOST = 1.0
"""Bytes of a table, at most, for each byte of the weights that need not be read."""

Vectorize = Callable[[fx.GraphModule, Sequence[Tensor], int], fx.GraphModule]
"""(graph, inputs, which of them has a further axis in front) -> the graph over that axis.

Raises Unsupported if an op has no form over it.
"""


class TimetablePass(Pass[SelectivePlan, SelectivePlan]):
    """A plan with a `timetable`, if any value is worth it.

    Args:
        varying: tells the inputs that change from step to step.
        vectorize: makes a graph that takes one time into one that takes many.
    """

    name = "timetable"

    def __init__(
        self, varying: Callable[[SelectivePlan], VaryingInputs], vectorize: Vectorize
    ) -> None:
        self._varying, self._vectorize = varying, vectorize

    def apply(self, value: SelectivePlan) -> SelectivePlan:
        """The plan with a timetable: what only the tabulated values needed is not computed."""
        inputs = self._varying(value)
        values = worth_a_table(value, region_of_time(value, inputs))
        if not values or inputs.time is None:
            return value
        try:
            timetable = tabulate(values, inputs.time, self._vectorize)
        except Unsupported as reason:
            return dataclasses.replace(value, untabulated=str(reason))
        return value.replan(timetable=timetable)

    def verify(self, value: SelectivePlan, result: SelectivePlan) -> None:
        """No table depends on anything else that varies, and what lived in caches still does."""
        inputs = self._varying(value)
        changing = descendants(value.axes.graph, (*inputs.latents, *baked_in(inputs)))
        for node in result.tabulated:
            if node in changing:
                raise PassError(f"{node.name} is tabulated, but more than time moves it")
            if node not in result.whole:
                raise PassError(f"{node.name} is tabulated, but nothing needs it")
        if result.cached != value.cached:
            raise PassError("the timetable pass changed what lives in caches")

    def summary(self, result: SelectivePlan) -> str:
        """How many values are tabulated, and the size of all tables; or why none is."""
        if result.untabulated:
            return f"nothing looked up by timestep: {result.untabulated}"
        count = TIMES_AT_ONCE * sum(node.meta["val"].nbytes for node in result.tabulated)
        return f"{len(result.tabulated)} values looked up by timestep, in tables of {count} bytes"

    def notes(self, result: SelectivePlan) -> Mapping[fx.Node, str]:
        """Which values are looked up."""
        return dict.fromkeys(result.tabulated, "looked up by timestep")


def region_of_time(plan: SelectivePlan, inputs: VaryingInputs) -> set[fx.Node]:
    """What depends on time, on no latent, and on no token; on scalars it may depend."""
    times = [n for n in (inputs.time,) if n is not None and not _has_tokens(plan, n)]
    region, beyond = set(times), {*inputs.latents, *baked_in(inputs)}
    for node in plan.axes.graph.nodes:
        timed = not region.isdisjoint(node.all_input_nodes)
        if not beyond.isdisjoint(node.all_input_nodes) or (timed and _has_tokens(plan, node)):
            beyond.add(node)
        elif timed:
            region.add(node)
    return region


def baked_in(inputs: VaryingInputs) -> list[fx.Node]:
    """Scalars that are no tensors: a graph for many times would keep the number it was made of."""
    return [node for node in inputs.scalars if not is_tensor(node)]


def _has_tokens(plan: SelectivePlan, node: fx.Node) -> bool:
    return is_tensor(node) and bool(plan.axes.axes_with(node, *plan.axes.segments))


def worth_a_table(plan: SelectivePlan, region: Set[fx.Node]) -> tuple[fx.Node, ...]:
    """Going back from where a region is used, the first values that cost enough to be looked up."""
    needed, arithmetic = plan.rows | plan.whole, Arithmetic(plan)
    least = LEAST * plan.axes.samples
    pending = [n for n in region & plan.whole if (needed & n.users.keys()) - region]
    found, seen = set[fx.Node](), set[fx.Node]()
    while pending:
        node = pending.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if is_tensor(node) and arithmetic.of(node) >= least and _is_small(node, region):
            found.add(node)
        else:
            pending += [operand for operand in node.all_input_nodes if operand in region]
    return tuple(node for node in plan.axes.graph.nodes if node in found)


def _is_small(node: fx.Node, region: Set[fx.Node]) -> bool:
    """Whether a table takes no more memory than what makes its values: it holds no token."""
    value: Tensor = node.meta["val"]
    others = [o.meta["val"] for o in node.all_input_nodes if o not in region and is_tensor(o)]
    weights = sum(other.nbytes for other in others)
    return not value.is_complex() and TIMES_AT_ONCE * value.nbytes <= MOST * weights


def tabulate(values: Sequence[fx.Node], time: fx.Node, vectorize: Vectorize) -> Timetable:
    """`values` for many times at once. Raises Unsupported if that cannot be had."""
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    needed = ancestors(*values)
    leaves = tuple(node for node in needed if node.op != "call_function")
    for node in leaves:
        made[node] = graph.placeholder(node.name)
    for node in needed:
        if node.op == "call_function":
            made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(tuple(made[node] for node in values))
    inputs = [_many(node) if node is time else node.meta["val"] for node in leaves]
    module = vectorize(fx.GraphModule({}, graph), inputs, leaves.index(time))
    if any(node.op == "get_attr" for node in module.graph.nodes):
        raise Unsupported("a value is made of constants")  # which programs would have to take over
    for value, many in zip(values, operands(module.graph.output_node()), strict=True):
        expected, found = _many(value), many.meta["val"]
        if (found.shape, found.dtype) != (expected.shape, expected.dtype):
            raise Unsupported(f"{value.name} has another form for many times")
    return Timetable(tuple(values), time, leaves, module)


def _many(node: fx.Node) -> Tensor:
    """A fake of as many of a value as a table has rows."""
    value: Tensor = node.meta["val"]
    return value.new_empty((TIMES_AT_ONCE, *shape_of(node)))
