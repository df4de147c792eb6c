"""Selective: decide for every value whether the token-selective program needs it whole or as rows.

*Rows* are the active tokens of the prunable segment together with all tokens of the others. A
token-wise op runs on rows; a whole operand that carries tokens is gathered; keys and values of
attention, and inputs of mixing ops that depend on attention, are *densified*: fresh rows go into a
cache, and the cache is read whole. What cannot be proved stays whole, which is always right.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import fx

from specdiff.errors import Unsupported
from specdiff.passes.base import Pass, PassError
from specdiff.passes.plan.axes import AxisFacts, ClassId, Layout
from specdiff.passes.plan.output import find_output
from specdiff.passes.rules.attention import ATTENTION, Attention, reads
from specdiff.passes.rules.elementwise import elementwise
from specdiff.passes.rules.registry import operands, rank_of, rule_for, shape_of

if TYPE_CHECKING:
    from specdiff.passes.plan.timetable import Timetable

aten = torch.ops.aten


@dataclass
class SelectivePlan:
    """Which values the selective program needs in which form."""

    axes: AxisFacts
    slots: tuple[fx.Node, ...]
    """The token-level outputs: what the model computes per token before the tail."""
    prunable: tuple[ClassId, ...]
    """The segments of the slots, in their order; tokens are numbered through all of them."""
    tail: tuple[fx.Node, ...]
    """Nodes from the slots to the outputs, in order."""
    rows: set[fx.Node] = field(default_factory=set)
    whole: set[fx.Node] = field(default_factory=set)
    cached: list[fx.Node] = field(default_factory=list)
    """Values that live in caches, in graph order."""
    fixed: tuple[fx.Node, ...] = ()
    """Values that no step changes (`passes.plan.invariant`), kept beside the caches."""
    timetable: Timetable | None = None
    """Of values that time alone moves (`passes.plan.timetable`), if there are any."""
    untabulated: str = ""
    """Why there is none although there are such values."""
    codes: Mapping[fx.Node, torch.dtype] = field(default_factory=dict)
    """Those of the cached whose caches hold 8-bit codes (`passes.plan.quantize`), of this dtype."""
    stale: frozenset[fx.Node] = frozenset()
    """Inputs whose inactive rows are not up to date: streams of tokens between two blocks."""

    @property
    def tabulated(self) -> tuple[fx.Node, ...]:
        """Values that a selective step looks up by time."""
        return self.timetable.values if self.timetable is not None else ()

    @cached_property
    def known(self) -> frozenset[fx.Node]:
        """Values that a selective step finds computed, whole."""
        return frozenset((*self.fixed, *self.tabulated))

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each prunable segment."""
        return tuple(self.axes.classes.size(segment) for segment in self.prunable)

    @property
    def tokens(self) -> int:
        """N."""
        return sum(self.lengths)

    @property
    def channels(self) -> int:
        """C of the widest slot, all axes but samples and tokens taken together."""
        return max(prod(cache_shape(self, slot)[2:]) for slot in self.slots)

    def first_token(self, segment: ClassId) -> int:
        """The number of a prunable segment's first token."""
        return sum(self.lengths[: self.prunable.index(segment)])

    @cached_property
    def attention_dependent(self) -> set[fx.Node]:
        """Everything downstream of an attention, here or in an earlier block."""
        found: set[fx.Node] = set(self.stale)
        for node in self.axes.graph.nodes:
            if node.target is ATTENTION or any(i in found for i in node.all_input_nodes):
                found.add(node)
        return found

    def carries(self, node: fx.Node) -> bool:
        """Whether prunable tokens lie along some axis of `node`."""
        return bool(self.axes.axes_with(node, *self.prunable))

    def token_axis(self, node: fx.Node) -> int | None:
        """The one axis with prunable tokens, or None if there is none or several."""
        found = self.axes.axes_with(node, *self.prunable)
        return found[0] if len(found) == 1 else None

    def layout(self, node: fx.Node) -> Layout:
        """The segments along the token axis of `node`."""
        axis = self.token_axis(node)
        return () if axis is None else self.axes.layout(node, axis)

    def token_operands(self, node: fx.Node) -> list[fx.Node]:
        """Operands that must be rows where `node` is: of an attention only its query."""
        if node.target is ATTENTION:
            return [o for o in [Attention.of(node).query] if self.carries(o)]
        return [o for o in node.all_input_nodes if self.carries(o)]

    def is_token_wise(self, node: fx.Node) -> bool:
        """Whether rows of `node` are proved to depend on the same rows of its operands alone."""
        return self.why_whole(node) is None

    def why_whole(self, node: fx.Node) -> str | None:
        """What keeps `node` from being computed row by row, or None if nothing does."""
        axis = self.token_axis(node)
        if node.op != "call_function":
            return "it is an input"
        if axis is None:
            return "its tokens lie along several axes" if self.carries(node) else "it has no tokens"
        if self.axes.batch_axis(node) in (None, axis):
            return "no axis of it counts samples"
        if node.target is ATTENTION and axis != rank_of(node) - 2:
            return "each token attends within itself"  # so its keys would be rows too
        joined = [p for p in self.axes.facts[node].parts if p.whole == (node, axis)]
        if not all(self.axes.is_exact(part) for part in joined):
            return "it joins tokens that overlap"  # at other places than in the joined value
        carriers = self.token_operands(node)
        if not carriers:
            expands = node.target is aten.expand.default
            return None if expands else "it makes tokens out of what has none"
        for operand in carriers:
            if not self._aligned(node, axis, operand):
                return "it mixes tokens, or nothing proves that it does not"
        return None

    def _aligned(self, node: fx.Node, axis: int, operand: fx.Node) -> bool:
        if operands(node).count(operand) > 1 and not _treats_alike(node):
            return False  # what links one occurrence may not link the other
        in_axis = self.token_axis(operand)
        facts = self.axes.facts[node]
        links = {(x.out_axis, x.in_axis) for x in facts.links if x.operand is operand}
        batch = self.axes.batch_axis(operand)
        if batch is None:
            if not self._fits_as_table(node, operand):
                return False
        elif (self.axes.batch_axis(node), batch) not in links:
            return False
        if (axis, in_axis) in links:
            return True
        here, there = (node, axis), (operand, in_axis)
        return any(
            {part.whole, part.part} == {here, there} and self.axes.is_exact(part)
            for part in facts.parts
        )

    def _fits_as_table(self, node: fx.Node, operand: fx.Node) -> bool:
        """Whether `operand`, which has no samples, can gain them by broadcasting."""
        batch = self.axes.batch_axis(node)
        assert batch is not None
        position = batch - (rank_of(node) - rank_of(operand))
        return rule_for(node) is elementwise and (position < 0 or shape_of(operand)[position] == 1)

    def extracted_from(self, node: fx.Node) -> fx.Node | None:
        """The operand of which `node` is a piece without prunable tokens, if there is one."""
        if self.carries(node):
            return None
        for part in self.axes.facts[node].parts:
            operand = part.whole[0]
            cut = part.part[0] is node and self.axes.is_exact(part)
            if cut and part.whole[1] == self.token_axis(operand) and self.is_token_wise(operand):
                return operand
        return None


class SelectivePass(Pass[AxisFacts, SelectivePlan]):
    """Finds the prunable segment and propagates needs backwards from the token-level output."""

    name = "selective"

    def apply(self, value: AxisFacts) -> SelectivePlan:
        """Raises Unsupported where no segment reaches the output token by token."""
        found = find_output(value)
        plan = SelectivePlan(value, found.slots, found.segments, found.tail)
        _require_self_contained_tail(plan)
        plan.rows.update(plan.slots)
        propagate(plan)
        if not plan.cached:
            raise Unsupported("no attention reads the prunable tokens, so nothing can be cached")
        return plan

    def verify(self, value: AxisFacts, result: SelectivePlan) -> None:
        """Operands of rows are there in the form that is needed."""
        for node in result.rows:
            if not result.is_token_wise(node):
                if node not in result.whole and node.op != "placeholder":
                    raise PassError(f"{node.name} is needed as rows and can be had in no form")
                continue
            for operand in result.token_operands(node):
                if operand not in result.rows:
                    raise PassError(f"{node.name}: operand {operand.name} is not there as rows")

    def summary(self, result: SelectivePlan) -> str:
        """How many values are needed in which form."""
        names = ", ".join(slot.name for slot in result.slots)
        rows, whole = (sum(n.op == "call_function" for n in s) for s in (result.rows, result.whole))
        return (
            f"{result.tokens} prunable tokens, output by token: {names};"
            f" {rows} values as rows, {whole} whole, {len(result.cached)} cached"
        )

    def notes(self, result: SelectivePlan) -> dict[fx.Node, str]:
        """The forms a value is needed in, and why it stays whole although it holds tokens."""
        forms = (("rows", result.rows), ("whole", result.whole), ("cached", set(result.cached)))
        found = {}
        for node in result.axes.graph.nodes:
            texts = [name for name, members in forms if node in members]
            if texts and result.carries(node) and "rows" not in texts:
                texts += [reason] if (reason := result.why_whole(node)) else []
            found[node] = ", ".join(texts) or "not needed"
        return found


def _require_self_contained_tail(plan: SelectivePlan) -> None:
    if not plan.attention_dependent.intersection(plan.slots):
        raise Unsupported("the output does not depend on an attention")
    for slot in plan.slots:
        if not plan.is_token_wise(slot):
            raise Unsupported(f"the token-level output {slot.name} is not computed token by token")
    for node in plan.tail:
        for operand in node.all_input_nodes:
            if operand in plan.attention_dependent and operand not in (*plan.tail, *plan.slots):
                raise Unsupported(f"{node.name} after the token-level output needs {operand.name}")


def _treats_alike(node: fx.Node) -> bool:
    """Whether what a node does with one operand it does with each; an attention is told apart."""
    joins = (aten.cat.default, aten.stack.default, ATTENTION)
    return rule_for(node) is elementwise or node.target in joins


def propagate(plan: SelectivePlan) -> None:
    """From the values that are needed, as `rows` and `whole` say, to all that they need."""
    for node in reversed(list(plan.axes.graph.nodes)):
        _propagate(plan, node)
    plan.cached.reverse()


def _propagate(plan: SelectivePlan, node: fx.Node) -> None:
    """Hand the needs of `node` on to its operands."""
    if node in plan.known:
        if node in plan.rows:
            plan.whole.add(node)  # to be gathered from
        return
    token_wise = plan.is_token_wise(node)
    cached = node in plan.whole and token_wise and _lives_in_cache(plan, node)
    if cached:
        plan.rows.add(node)
        plan.cached.append(node)
    if node in plan.rows:
        if token_wise:
            _need_rows(plan, node)
        elif node.op != "placeholder":  # an input is there to be gathered from
            plan.whole.add(node)
    if node in plan.whole and not cached:
        source = plan.extracted_from(node)
        if source is not None:
            plan.rows.add(source)
        else:
            plan.whole.update(node.all_input_nodes)


def _need_rows(plan: SelectivePlan, node: fx.Node) -> None:
    carriers = plan.token_operands(node)
    plan.rows.update(carriers)
    plan.whole.update(o for o in node.all_input_nodes if o not in carriers)
    if node.target is ATTENTION:
        found = Attention.of(node)
        plan.whole.update((found.key, found.value))


def _lives_in_cache(plan: SelectivePlan, node: fx.Node) -> bool:
    """Keys and values always; anything else only where computing it whole costs an attention."""
    if node in plan.attention_dependent:
        return True
    return any(reads(user, node) for user in node.users)


def ancestors(*targets: fx.Node, known: Container[fx.Node] = ()) -> list[fx.Node]:
    """The targets and all that they depend on, in graph order, up to what is `known`."""
    found: set[fx.Node] = set()
    pending = list(targets)
    while pending:
        node = pending.pop()
        if node not in found and node not in known:
            found.add(node)
            pending += node.all_input_nodes
    return [node for node in targets[0].graph.nodes if node in found]


def cache_order(plan: SelectivePlan, node: fx.Node) -> list[int]:
    """The permutation that brings batch and token axes of a cached value to the front."""
    batch, tokens = plan.axes.batch_axis(node), plan.token_axis(node)
    assert batch is not None and tokens is not None
    return [batch, tokens, *(a for a in range(rank_of(node)) if a not in (batch, tokens))]


def cache_shape(plan: SelectivePlan, node: fx.Node) -> tuple[int, ...]:
    """Shape of the cache of a value, batch and tokens first."""
    return tuple(shape_of(node)[axis] for axis in cache_order(plan, node))
