"""Token facts: where the prunable tokens of each value lie, and which values are token-wise.

A value is token-wise if each of its rows provably depends on the same rows of its operands alone.
Without a proof it is not, which is always right.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from specdiff.passes.graph.dependence import descendants
from specdiff.passes.rules.attention import ATTENTION, Attention
from specdiff.passes.rules.elementwise import elementwise
from specdiff.passes.rules.registry import operands, rank_of, rule_for, shape_of
from specdiff.passes.select.axes import AxisFacts, ClassId, Layout

aten = torch.ops.aten


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenFacts:
    """A graph, and the tokens of it that a selective step may leave out."""

    axes: AxisFacts
    prunable: tuple[ClassId, ...]
    """Segments whose tokens may be left out; tokens are numbered through all of them."""
    stale: frozenset[fx.Node] = frozenset()
    """Inputs whose inactive rows are out of date: the tokens that one block hands to the next."""

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each prunable segment."""
        return tuple(self.axes.classes.size(segment) for segment in self.prunable)

    @property
    def tokens(self) -> int:
        """N."""
        return sum(self.lengths)

    def first_token(self, segment: ClassId) -> int:
        """The number of a prunable segment's first token."""
        return sum(self.lengths[: self.prunable.index(segment)])

    @cached_property
    def attention_dependent(self) -> set[fx.Node]:
        """Everything downstream of an attention, here or in an earlier block."""
        attentions = self.axes.graph.find_nodes(op="call_function", target=ATTENTION)
        return descendants(self.axes.graph, {*self.stale, *attentions})

    def carries(self, node: fx.Node) -> bool:
        """Whether prunable tokens lie along some axis of `node`."""
        return bool(self.axes.axes_with(node, *self.prunable))

    def token_axis(self, node: fx.Node) -> int | None:
        """The one axis with prunable tokens, or None if there is none or several."""
        candidates = self.axes.axes_with(node, *self.prunable)
        return candidates[0] if len(candidates) == 1 else None

    def layout(self, node: fx.Node) -> Layout:
        """The segments along the token axis of `node`."""
        axis = self.token_axis(node)
        return () if axis is None else self.axes.layout(node, axis)

    def token_operands(self, node: fx.Node) -> list[fx.Node]:
        """Operands that must be rows if `node` is; of an attention only the query."""
        if node.target is ATTENTION:
            return [o for o in [Attention.of(node).query] if self.carries(o)]
        return [o for o in node.all_input_nodes if self.carries(o)]

    def is_token_wise(self, node: fx.Node) -> bool:
        """Whether rows of `node` provably depend on the same rows of its operands alone."""
        return self.why_whole(node) is None

    def why_whole(self, node: fx.Node) -> str | None:
        """Why `node` cannot be computed row by row, or None if it can."""
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
        """The operand that `node` cuts a piece without prunable tokens out of, if there is one."""
        if self.carries(node):
            return None
        for part in self.axes.facts[node].parts:
            operand = part.whole[0]
            cut = part.part[0] is node and self.axes.is_exact(part)
            if cut and part.whole[1] == self.token_axis(operand) and self.is_token_wise(operand):
                return operand
        return None

    def cache_order(self, node: fx.Node) -> list[int]:
        """The permutation that brings the batch and token axes of a cached value to the front."""
        batch, tokens = self.axes.batch_axis(node), self.token_axis(node)
        assert batch is not None and tokens is not None
        return [batch, tokens, *(a for a in range(rank_of(node)) if a not in (batch, tokens))]

    def cache_shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of the cache of a value, batch and tokens first."""
        return tuple(shape_of(node)[axis] for axis in self.cache_order(node))


def _treats_alike(node: fx.Node) -> bool:
    """Whether a node does the same with each operand, or, as an attention, is handled apart."""
    joins = (aten.cat.default, aten.stack.default, ATTENTION)
    return rule_for(node) is elementwise or node.target in joins
