"""Needs: given the values that a program must produce, find all values that it needs, and how.

*Rows* of a value are the active tokens of its prunable segments and all tokens of the others. A
value is needed as rows, whole, or both:

    who needs the value                      how it is had
    a token-wise op, as rows                 its rows are computed; a whole value is gathered from
    an attention, as keys or values          *densified*: rows are computed and written into a
    another mixing op after an attention       cache, and the cache is read whole
    any other op, or an unproved one         computed whole, which is always right
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import NamedTuple

from torch import fx

from specdiff.passes.rules.attention import ATTENTION, Attention, reads
from specdiff.passes.select.token_facts import TokenFacts


class Needs(NamedTuple):
    """The forms in which values are needed: a value may be in both sets, or in neither."""

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
    """Walk the graph backwards; what a node needs becomes a need of its operands.

    An example, read from the bottom up. `out` is needed as rows; nothing is known:

        x    = embed(latent)       rows, because q and k are
        q, k = linear(x)           q: rows. k: whole and read by an attention -> cached, and rows
        a    = attention(q, k, k)  rows -> q as rows, k whole: every row looks at all tokens
        m    = mean(text)          whole -> text whole: a mean has no rows
        out  = a + m               rows, token-wise -> a as rows, m whole: m has no tokens

    Every line that fits a node applies:

        node                       needed    what it hands on
        known                      as rows   itself whole, so that its rows can be gathered
        known                      whole     nothing
        token-wise                 as rows   its token operands as rows, the others whole; an
                                             attention also its keys and values whole
        not token-wise             as rows   itself whole, so that its rows can be gathered
        token-wise and cacheable   whole     itself as rows, and it is cached
        any other                  whole     its operands whole; if it cuts a piece without tokens
                                             out of a token-wise value: that value as rows

    A value is cacheable if an attention reads it as key or value, or if it depends on an attention.

    Args:
        facts: the graph's axes and tokens.
        rows: values that must be had as rows.
        whole: values that must be had whole.
        known: values that are there whole without being computed.
    """
    needs = _Propagation(facts, set(rows), set(whole), known)
    for node in reversed(list(facts.axes.graph.nodes)):
        needs.hand_on(node)
    return Needs(frozenset(needs.rows), frozenset(needs.whole), tuple(reversed(needs.cached)))


class _Propagation:
    """The needs collected so far, from the last node to the first."""

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
        """Turn the needs of `node` into needs of its operands."""
        if node in self._known:
            if node in self.rows:
                self.whole.add(node)  # its rows are gathered from it
            return
        token_wise = self._facts.is_token_wise(node)
        cached = node in self.whole and token_wise and self._lives_in_cache(node)
        if cached:
            self.rows.add(node)
            self.cached.append(node)
        if node in self.rows:
            if token_wise:
                self._need_rows(node)
            elif node.op != "placeholder":  # rows are gathered; an input is there whole
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
        """Keys and values do; others only if computing them whole would cost an attention."""
        if node in self._facts.attention_dependent:
            return True
        return any(reads(user, node) for user in node.users)
