"""Timetable: values that time alone moves are computed for many timesteps at once, and looked up.

The shifts, scales and gates of a diffusion transformer depend on the timestep and on conditions,
not on the latent. A step that computes few tokens spends a good part of itself on reading the
weights that make them. Here they are *tabulated*: a table has a row for each of `TIMES_AT_ONCE`
timesteps, a program of its own fills it in one go, and a selective step reads one row. Proved from
the graph; a dense step goes on computing them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, fx

from specdiff.errors import Unsupported
from specdiff.passes.base import Pass, PassError
from specdiff.passes.invariant import VaryingInputs, moving, worth_keeping
from specdiff.passes.rules.registry import is_tensor, shape_of
from specdiff.passes.selective import SelectivePlan, ancestors, propagate
from specdiff.program import TIMES_AT_ONCE

LEAST = 1e5
"""FLOPs a sample that a table saves, at least: it is one more input of every program."""

Vectorize = Callable[[fx.GraphModule, Sequence[Tensor], int], fx.GraphModule]
"""(graph, inputs, which of them has a further axis in front) -> the graph over that axis."""


@dataclasses.dataclass(frozen=True)
class Timetable:
    """How values are computed for many times."""

    values: tuple[fx.Node, ...]
    """Of the traced graph: what is tabulated."""
    time: fx.Node
    leaves: tuple[fx.Node, ...]
    """Inputs and constants of the traced graph that the values are made of, time among them."""
    module: fx.GraphModule
    """From the leaves, TIMES_AT_ONCE times in place of one, to the values, as many of each."""


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
        self._refusal = ""

    def apply(self, value: SelectivePlan) -> SelectivePlan:
        """The same plan, its needs told anew from what is no longer computed."""
        inputs = self._varying(value)
        region = region_of_time(value, inputs)
        least = LEAST * value.axes.samples
        tabulated = worth_keeping(value, value.whole & region, lambda _: least)
        if not tabulated or inputs.time is None:
            return value
        try:
            timetable = tabulate(tabulated, inputs.time, self._vectorize)
        except Exception as error:  # an op that cannot be vectorized: nothing is lost but time
            self._refusal = f", for {type(error).__name__}: {error}"
            return value
        plan = dataclasses.replace(
            value, rows=set(value.slots), whole=set(), cached=[], timetable=timetable
        )
        propagate(plan)
        return plan

    def verify(self, value: SelectivePlan, result: SelectivePlan) -> None:
        """No table depends on anything else that varies, and what lived in caches still does."""
        changing = moving(value, self._varying(value).latents)
        for node in result.tabulated:
            if node in changing:
                raise PassError(f"{node.name} is tabulated, but does not depend on time alone")
        if result.cached != value.cached:
            raise PassError("the timetable pass changed what lives in caches")

    def summary(self, result: SelectivePlan) -> str:
        """How many values are tabulated, and the size of all tables."""
        count = TIMES_AT_ONCE * sum(node.meta["val"].nbytes for node in result.tabulated)
        tables = f"{len(result.tabulated)} values looked up by timestep, in tables of {count} bytes"
        return tables + self._refusal

    def notes(self, result: SelectivePlan) -> Mapping[fx.Node, str]:
        """Which values are looked up."""
        return dict.fromkeys(result.tabulated, "looked up by timestep")


def region_of_time(plan: SelectivePlan, inputs: VaryingInputs) -> set[fx.Node]:
    """What depends on time or a scalar, on nothing else that varies, and on no token.

    A table of tokens would be as large as many caches.
    """
    ticking = [n for n in (inputs.time, *inputs.scalars) if n is not None]
    region = {node for node in ticking if is_tensor(node) and not _has_tokens(plan, node)}
    beyond = {*ticking, *inputs.latents} - region
    for node in plan.axes.graph.nodes:
        moved = not region.isdisjoint(node.all_input_nodes)
        if not beyond.isdisjoint(node.all_input_nodes) or (moved and _has_tokens(plan, node)):
            beyond.add(node)
        elif moved:
            region.add(node)
    return region


def _has_tokens(plan: SelectivePlan, node: fx.Node) -> bool:
    return is_tensor(node) and bool(plan.axes.axes_with(node, *plan.axes.segments))


def tabulate(values: Sequence[fx.Node], time: fx.Node, vectorize: Vectorize) -> Timetable:
    """`values` for many times at once. Raises whatever `vectorize` does of an op it cannot take."""
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
        raise Unsupported("they are made of constants")  # which a program would have to take over
    return Timetable(tuple(values), time, leaves, module)


def _many(time: fx.Node) -> Tensor:
    """A fake of as many times as a table has rows."""
    value: Tensor = time.meta["val"]
    return value.new_empty((TIMES_AT_ONCE, *shape_of(time)))
