"""Timetable: compute values that depend on time alone for many timesteps at once; look them up.

The shifts, scales and gates of a diffusion transformer depend on timestep and conditions, not on
the latent. A step with few tokens spends much of its time reading the weights that compute them.
So they are *tabulated*: a table has a row for each of `TIMES_AT_ONCE` timesteps, filled in one go,
and a selective step reads one row. Dense steps still compute them; what is cheap, such as
1 + scale, every step computes.

    before                                   after, in a selective step
    emb   = mlp(embed(t))   [B, C]           (not computed)
    mod   = linear(emb)     [B, 6C]          mod   = table[row]
    scale = mod[:, :C]                       scale = mod[:, :C]
    y     = norm(x) * (1 + scale)            y     = norm(x) * (1 + scale)

    and the program that fills it: table[i] = linear(mlp(embed(times[i])))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence, Set

from torch import Tensor, fx

from specdiff.errors import Unsupported
from specdiff.passes.base import Pass, PassError
from specdiff.passes.graph.dependence import ancestors, descendants
from specdiff.passes.rules.registry import is_tensor, operands, shape_of
from specdiff.passes.select.cost import Arithmetic
from specdiff.passes.select.input_roles import VaryingInputs
from specdiff.passes.select.selection import Selection, Timetable
from specdiff.program import TIMES_AT_ONCE

LEAST = 1e5
"""FLOPs per sample that a table must save: it is one more input of every program."""
MOST = 1.0
"""Bytes that a table may have for each byte of weights that need no longer be read."""

Vectorize = Callable[[fx.GraphModule, Sequence[Tensor], int], fx.GraphModule]
"""(graph, inputs, index of the input with a further axis in front) -> the graph over that axis.

Raises Unsupported if an op cannot be vectorized.
"""


class TimetablePass(Pass[Selection, Selection]):
    """Adds a `timetable` to a selection, if any value is worth it.

    Args:
        varying: finds the inputs that change from step to step.
        vectorize: turns a graph for one time into a graph for many times.
    """

    name = "timetable"

    def __init__(self, varying: Callable[[Selection], VaryingInputs], vectorize: Vectorize) -> None:
        self._varying, self._vectorize = varying, vectorize

    def apply(self, value: Selection) -> Selection:
        """The selection with a timetable; what only tabulated values needed is not computed."""
        inputs = self._varying(value)
        values = worth_a_table(value, region_of_time(value, inputs))
        if not values or inputs.time is None:
            return value
        try:
            timetable = tabulate(values, inputs.time, self._vectorize)
        except Unsupported as reason:
            return dataclasses.replace(value, untabulated=str(reason))
        return value.with_needs(timetable=timetable)

    def verify(self, value: Selection, result: Selection) -> None:
        """Check that tables depend on time alone, and that the caches are the same."""
        inputs = self._varying(value)
        changing = descendants(value.axes.graph, (*inputs.latents, *baked_in(inputs)))
        for node in result.tabulated:
            if node in changing:
                raise PassError(f"{node.name} is tabulated, but depends on more than time")
            if node not in result.whole:
                raise PassError(f"{node.name} is tabulated, but nothing needs it")
        if result.cached != value.cached:
            raise PassError("the timetable pass changed what lives in caches")

    def summary(self, result: Selection) -> str:
        """How many values are tabulated, and the size of all tables; or why there are none."""
        if result.untabulated:
            return f"nothing looked up by timestep: {result.untabulated}"
        count = TIMES_AT_ONCE * sum(node.meta["val"].nbytes for node in result.tabulated)
        return f"{len(result.tabulated)} values looked up by timestep, in tables of {count} bytes"

    def notes(self, result: Selection) -> Mapping[fx.Node, str]:
        """Which values are looked up."""
        return dict.fromkeys(result.tabulated, "looked up by timestep")


def region_of_time(selection: Selection, inputs: VaryingInputs) -> set[fx.Node]:
    """Values that depend on time, and on neither latents nor tokens; scalars are allowed."""
    times = [n for n in (inputs.time,) if n is not None and not _has_tokens(selection, n)]
    region, beyond = set(times), {*inputs.latents, *baked_in(inputs)}
    for node in selection.axes.graph.nodes:
        timed = not region.isdisjoint(node.all_input_nodes)
        if not beyond.isdisjoint(node.all_input_nodes) or (timed and _has_tokens(selection, node)):
            beyond.add(node)
        elif timed:
            region.add(node)
    return region


def baked_in(inputs: VaryingInputs) -> list[fx.Node]:
    """Scalars that are Python numbers: a graph for many times would hold them as constants."""
    return [node for node in inputs.scalars if not is_tensor(node)]


def _has_tokens(selection: Selection, node: fx.Node) -> bool:
    return is_tensor(node) and bool(selection.axes.axes_with(node, *selection.axes.segments))


def worth_a_table(selection: Selection, region: Set[fx.Node]) -> tuple[fx.Node, ...]:
    """Walk back from where a region is used to the first values that are worth a table."""
    needed, arithmetic = selection.rows | selection.whole, Arithmetic(selection)
    least = LEAST * selection.axes.samples
    pending = [n for n in region & selection.whole if (needed & n.users.keys()) - region]
    worthy, seen = set[fx.Node](), set[fx.Node]()
    while pending:
        node = pending.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if is_tensor(node) and arithmetic.of(node) >= least and _is_small(node, region):
            worthy.add(node)
        else:
            pending += [operand for operand in node.all_input_nodes if operand in region]
    return tuple(node for node in selection.axes.graph.nodes if node in worthy)


def _is_small(node: fx.Node, region: Set[fx.Node]) -> bool:
    """Whether a table takes no more memory than the weights that its values are computed from."""
    value: Tensor = node.meta["val"]
    others = [o.meta["val"] for o in node.all_input_nodes if o not in region and is_tensor(o)]
    weights = sum(other.nbytes for other in others)
    return not value.is_complex() and TIMES_AT_ONCE * value.nbytes <= MOST * weights


def tabulate(values: Sequence[fx.Node], time: fx.Node, vectorize: Vectorize) -> Timetable:
    """A graph that computes `values` for many times at once. Raises Unsupported if impossible."""
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
        raise Unsupported("a value is made of constants")  # programs would have to hold them
    for value, many in zip(values, operands(module.graph.output_node()), strict=True):
        expected, made_many = _many(value), many.meta["val"]
        if (made_many.shape, made_many.dtype) != (expected.shape, expected.dtype):
            raise Unsupported(f"{value.name} has another form for many times")
    return Timetable(tuple(values), time, leaves, module)


def _many(node: fx.Node) -> Tensor:
    """A fake tensor with one value for each row of a table."""
    value: Tensor = node.meta["val"]
    return value.new_empty((TIMES_AT_ONCE, *shape_of(node)))
