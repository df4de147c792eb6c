"""Residuals: the additions `x + branch(x)` between which the regions of a model lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from specdiff.passes.rules.attention import ATTENTION
from specdiff.passes.rules.linear import LINEARS
from specdiff.passes.rules.registry import shape_of
from specdiff.passes.rules.spatial import CONVOLUTIONS

aten = torch.ops.aten
PROJECTIONS = (*LINEARS, *CONVOLUTIONS)


def residual_additions(computed: Sequence[fx.Node], tokens: set[fx.Node]) -> set[fx.Node]:
    """Additions x + branch(x) among `tokens`; `computed` are all nodes, in graph order.

    Other ops also add two token values of one shape. RoPE does, but neither of its values depends
    on the other; a written-out GELU does, but no projection lies between its values.
    """
    additions = set()
    branches = _Branches(computed, tokens)
    for node in tokens:
        if node.target is not aten.add.Tensor:
            continue
        operands = [o for o in node.args[:2] if isinstance(o, fx.Node)]
        same = all(o in tokens and shape_of(o) == shape_of(node) for o in operands)
        if len(operands) == 2 and same and branches.meet(*operands):
            additions.add(node)
    return additions


class _Branches:
    """Which values depend on which: a set of nodes is an integer with a bit for each."""

    def __init__(self, computed: Sequence[fx.Node], tokens: set[fx.Node]) -> None:
        self._bit = {node: 1 << i for i, node in enumerate(computed)}
        self._made_of: dict[fx.Node, int] = {}
        for node in computed:
            made = self._bit[node]
            for operand in node.all_input_nodes:
                made |= self._made_of.get(operand, 0)
            self._made_of[node] = made
        working = (*PROJECTIONS, ATTENTION)
        self._work = [node for node in computed if node in tokens and node.target in working]

    def meet(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether one is a branch: computed from the other by a projection, or a gated linear."""
        return (
            self._branched(one, other)
            or self._branched(other, one)
            or _is_gated_linear(one)
            or _is_gated_linear(other)
        )

    def _branched(self, stem: fx.Node, end: fx.Node) -> bool:
        start, made = self._bit[stem], self._made_of[end]
        return bool(made & start) and any(
            made & self._bit[work] and self._made_of[work] & start for work in self._work
        )


def _is_gated_linear(node: fx.Node) -> bool:
    """Whether `node` ends a branch that started further back, beside another branch."""
    while node.target in (aten.mul.Tensor, aten.dropout.default, aten.div.Tensor):
        streams = [o for o in node.all_input_nodes if shape_of(o) == shape_of(node)]
        if len(streams) != 1:
            return False
        node = streams[0]
    return node.target in LINEARS
