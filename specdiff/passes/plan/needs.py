"""Needs: from the values that a program must have to all that it needs for them.

*Rows* are the active tokens of the prunable segments together with all tokens of the others. A
token-wise op runs on rows; a whole operand that carries tokens is gathered; keys and values of
attention, and inputs of mixing ops that depend on attention, are *densified*: fresh rows go into a
cache, and the cache is read whole. What cannot be proved stays whole, which is always right.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import NamedTuple

from torch import fx

from specdiff.passes.plan.token_facts import TokenFacts
from specdiff.passes.rules.attention import ATTENTION, Attention, reads


class Needs(NamedTuple):
    """The form in which each value is needed; it may be both, or neither."""

    rows: frozenset[fx.Node]
    whole: frozenset[fx.Node]
    cached: tuple[fx.Node, ...]
    """Values that live in caches, in graph order."""


def propagate(
    facts: TokenFacts,
    rows: Iterable[fx.Node],
    whole: Iterable[fx.Node],
    known: Container[fx.Node],
) -> Needs:
    """Walk the graph backwards, handing the need of each value on to its operands.

    An example, of which `out` is needed as rows and nothing is known:

        x    = embed(latent)       rows, since q and k are
        q, k = linear(x)           q: rows; k: whole, read by an attention -> cached, and rows
        a    = attention(q, k, k)  rows -> q as rows, k whole: every row looks at all tokens
        m    = mean(text)          whole -> text whole: nothing to be had row by row
        out  = a + m               rows, token-wise -> a as rows, m whole: it has no tokens

    Args:
        facts: of the graph.
        rows: values that must be there as rows.
        whole: values that must be there whole.
        known: values that are there whole without being computed.
    """
    needs = _Propagation(facts, set(rows), set(whole), known)
    for node in reversed(list(facts.axes.graph.nodes)):
        needs.hand_on(node)
    return Needs(frozenset(needs.rows), frozenset(needs.whole), tuple(reversed(needs.cached)))


class _Propagation:
    """Needs as they grow, from the last node to the first."""

    def __init__(
        self,
        facts: TokenFacts,
        rows: set[fx.Node],
        whole: set[fx.Node],
        known: Container[fx.Node],
    ) -> None:
        self._facts, self._known = facts, known
        self.rows, self.whole = rows, whole
        self.cached: list[fx.Node] = []

    def hand_on(self, node: fx.Node) -> None:
        """The needs of `node` become needs of its operands."""
        if node in self._known:
            if node in self.rows:
                self.whole.add(node)  # to be gathered from
            return
        token_wise = self._facts.is_token_wise(node)
        cached = node in self.whole and token_wise and self._lives_in_cache(node)
        if cached:
            self.rows.add(node)
            self.cached.append(node)
        if node in self.rows:
            if token_wise:
                self._need_rows(node)
            elif node.op != "placeholder":  # an input is there to be gathered from
                self.whole.add(node)
        if node in self.whole and not cached:
            source = self._facts.extracted_from(node)
            if source is not None:
                self.rows.add(source)
            else:
                self.whole.update(node.all_input_nodes)

    def _need_rows(self, node: fx.Node) -> None:
        carriers = self._facts.token_operands(node)
        self.rows.update(carriers)
        self.whole.update(o for o in node.all_input_nodes if o not in carriers)
        if node.target is ATTENTION:
            attention = Attention.of(node)
            self.whole.update((attention.key, attention.value))

    def _lives_in_cache(self, node: fx.Node) -> bool:
        """Keys and values always; others only where computing them whole costs an attention."""
        if node in self._facts.attention_dependent:
            return True
        return any(reads(user, node) for user in node.users)
