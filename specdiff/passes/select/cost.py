"""Cost: arithmetic and memory traffic of dense and selective steps, as formulas in B, N, K and T.

A size that provably counts samples, image tokens or text tokens is a symbol; any other is the
traced number. Several prunable segments share N and K in proportion to their lengths; the other
segments share T.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import prod

import sympy
import torch
from torch import fx

from specdiff.passes.graph.dependence import ancestors
from specdiff.passes.normalize.fuse_attention import PRODUCTS
from specdiff.passes.rules.attention import ATTENTION, Attention
from specdiff.passes.rules.linear import LINEARS
from specdiff.passes.rules.registry import is_tensor, operand_at, rank_of, shape_of
from specdiff.passes.rules.spatial import CONVOLUTIONS
from specdiff.passes.select.cache_layout import SCALE
from specdiff.passes.select.selection import Selection
from specdiff.program import TIMES_AT_ONCE

aten = torch.ops.aten
BATCH = sympy.Symbol("B", integer=True, positive=True)
TOKENS = sympy.Symbol("N", integer=True, positive=True)
ACTIVE = sympy.Symbol("K", integer=True, nonnegative=True)
TEXT = sympy.Symbol("T", integer=True, nonnegative=True)
ZERO = sympy.Integer(0)
FUNCTIONS = (
    aten.cos.default,
    aten.sin.default,
    aten.exp.default,
    aten.pow.Scalar,
    aten.pow.Tensor_Scalar,
    aten.polar.default,
)
FUNCTION_FLOPS = 16
"""Rough cost of one element of such a function."""


@dataclass(frozen=True)
class Sizes:
    """The values of the symbols in the traced graph."""

    batch: int
    """B: samples of a call."""
    tokens: int
    """N: tokens that may be left out."""
    text: int
    """T: tokens that are always computed."""

    @classmethod
    def of(cls, selection: Selection) -> Sizes:
        """The sizes of a selection's graph."""
        classes = selection.axes.classes
        others = [s for s in selection.axes.segments if s not in selection.prunable]
        return cls(
            classes.size(selection.axes.batch), selection.tokens, sum(map(classes.size, others))
        )

    def evaluate(self, formula: sympy.Expr, active: int | None = None) -> float:
        """A formula's value at K = `active`, by default at K = N."""
        known = {
            BATCH: self.batch,
            TOKENS: self.tokens,
            ACTIVE: self.tokens if active is None else active,
            TEXT: self.text,
        }
        return float(formula.xreplace({k: sympy.Integer(v) for k, v in known.items()}))


@dataclass(frozen=True)
class Work:
    """The cost of running some nodes once."""

    flops: sympy.Expr
    """Those of products, attentions and convolutions; a multiplication and an addition are two."""
    moved: sympy.Expr
    """Bytes read and written if every region is one kernel: a lower bound."""

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.moved + other.moved)


NOTHING = Work(ZERO, ZERO)


class CostModel:
    """Counts the cost of nodes, in a dense step and in a selective step."""

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self.sizes = Sizes.of(selection)

    def dense_work(self, nodes: Collection[fx.Node]) -> Work:
        """The cost of some nodes in a dense step: all rows."""
        flops = sum((self._flops(node, rows=False) for node in nodes), ZERO)
        values = [*_inputs(nodes), *_outputs(nodes)]
        moved = sum((self._bytes(value, rows=False) for value in values), ZERO)
        filled = [node for node in nodes if node not in self._selection.tabulated]
        return Work(flops, moved + self.caches(filled))

    def selective_work(self, nodes: Collection[fx.Node]) -> Work:
        """The cost of some nodes in a selective step."""
        selection = self._selection
        flops = sum((self._flops(n, rows=True) for n in nodes if self._as_rows(n)), ZERO)
        flops += sum((self._flops(n, rows=False) for n in nodes if self._as_whole(n)), ZERO)
        # known values are inputs of whatever reads them
        needed = [
            n
            for n in nodes
            if (n in selection.rows or n in selection.whole) and n not in selection.known
        ]
        values = [*_inputs(needed), *_outputs(needed)]
        moved = sum((self._bytes(v, rows=v in selection.rows) for v in values), ZERO)
        cached = [n for n in nodes if n in selection.cached]
        written = sum((self._stored_bytes(n, rows=True) for n in cached), ZERO)
        return Work(flops, moved + written + self.caches(cached))

    def caches(self, nodes: Collection[fx.Node]) -> sympy.Expr:
        """Bytes that some nodes store between steps."""
        selection = self._selection
        held = (node for node in nodes if node in selection.cached or node in selection.fixed)
        tables = (self._bytes(node, rows=False) for node in nodes if node in selection.tabulated)
        return sum(
            (self._stored_bytes(n, rows=False) for n in held), TIMES_AT_ONCE * sum(tables, ZERO)
        )

    def flops(self, node: fx.Node) -> sympy.Expr:
        """FLOPs of all rows of one node."""
        return self._flops(node, rows=False)

    def _as_rows(self, node: fx.Node) -> bool:
        return node in self._selection.rows and self._selection.is_token_wise(node)

    def _as_whole(self, node: fx.Node) -> bool:
        selection = self._selection
        computed = (
            node in selection.whole and node not in selection.cached and node not in selection.known
        )
        return computed and selection.extracted_from(node) is None

    def _size(self, node: fx.Node, axis: int, rows: bool) -> sympy.Expr:
        """Positions along one axis; of prunable tokens only the active ones if `rows`."""
        selection, axes = self._selection, self._selection.axes
        if axis == axes.batch_axis(node):
            return BATCH
        layout = axes.layout(node, axis)
        if any(piece.segment not in axes.segments for piece in layout):
            return sympy.Integer(shape_of(node)[axis])
        image = TOKENS if not rows or axis != selection.token_axis(node) else ACTIVE
        prunable = sum(piece.length for piece in layout if piece.segment in selection.prunable)
        others = sum(piece.length for piece in layout) - prunable
        return image * sympy.Rational(prunable, selection.tokens) + (
            TEXT * sympy.Rational(others, self.sizes.text) if others else ZERO
        )

    def _elements(self, node: fx.Node, rows: bool) -> sympy.Expr:
        return sympy.Mul(*(self._size(node, axis, rows) for axis in range(rank_of(node))))

    def _bytes(self, node: fx.Node, rows: bool) -> sympy.Expr:
        return self._elements(node, rows) * node.meta["val"].dtype.itemsize

    def _stored_bytes(self, node: fx.Node, rows: bool) -> sympy.Expr:
        """Bytes of the tensors that store a value between steps."""
        code = self._selection.codes.get(node)
        if code is None:
            return self._bytes(node, rows)
        scale = sympy.Rational(SCALE.itemsize, shape_of(node)[-1])
        return self._elements(node, rows) * (code.itemsize + scale)

    def _flops(self, node: fx.Node, rows: bool) -> sympy.Expr:
        if node.target in LINEARS:
            return 2 * self._elements(node, rows) * shape_of(operand_at(node, 1))[1]
        if node.target is ATTENTION:
            attention = Attention.of(node)
            keys = self._size(attention.key, rank_of(attention.key) - 2, rows=False)
            elements = self._elements(attention.query, rows) + self._elements(node, rows)
            return 2 * keys * elements
        if node.target in PRODUCTS:
            left = operand_at(node, 0)
            summed = self._size(left, rank_of(left) - 1, rows=False)
            return 2 * self._elements(node, rows) * summed
        if node.target in CONVOLUTIONS:
            return 2 * self._elements(node, rows) * prod(shape_of(operand_at(node, 1))[1:])
        return ZERO


class Arithmetic:
    """FLOPs of computing values from the graph's inputs."""

    def __init__(self, selection: Selection) -> None:
        self._cost = CostModel(selection)
        self._flops: dict[fx.Node, float] = {}

    def behind(self, node: fx.Node, known: Collection[fx.Node]) -> float:
        """FLOPs of a value and of all that it depends on, except known values."""
        return sum(map(self.of, ancestors(node, known=set(known))))

    def of(self, node: fx.Node) -> float:
        """FLOPs of one node."""
        if node not in self._flops:
            if node.target in FUNCTIONS:
                self._flops[node] = FUNCTION_FLOPS * float(node.meta["val"].numel())
            else:
                self._flops[node] = self._cost.sizes.evaluate(self._cost.flops(node))
        return self._flops[node]


def _inputs(nodes: Collection[fx.Node]) -> list[fx.Node]:
    """Tensors from outside that these nodes read, each once."""
    inside = set(nodes)
    read = {o: None for n in nodes for o in n.all_input_nodes if o not in inside and is_tensor(o)}
    return list(read)


def _outputs(nodes: Collection[fx.Node]) -> list[fx.Node]:
    """Those of these nodes that others read."""
    inside = set(nodes)
    return [n for n in nodes if is_tensor(n) and not inside.issuperset(n.users)]
