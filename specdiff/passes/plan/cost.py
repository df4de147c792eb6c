"""Cost: arithmetic and memory traffic of a plan, as formulas in B, N, K and T.

A size that is proved to count samples, image tokens or text tokens is a symbol; every other is the
number that was traced. Where there are several prunable segments, each holds its share of N and
of K; the others likewise share T.
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
from specdiff.passes.plan.cache_layout import SCALE
from specdiff.passes.plan.selective_plan import SelectivePlan
from specdiff.passes.rules.attention import ATTENTION, Attention
from specdiff.passes.rules.registry import is_tensor, operand_at, rank_of, shape_of
from specdiff.passes.rules.spatial import CONVOLUTIONS
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
"""What an element of one of these costs, about."""


@dataclass(frozen=True)
class Sizes:
    """What the symbols stand for in the graph that was traced."""

    batch: int
    """B: samples of a call."""
    tokens: int
    """N: tokens that may be left out."""
    text: int
    """T: tokens that are always computed."""

    @classmethod
    def of(cls, plan: SelectivePlan) -> Sizes:
        """Those of a plan."""
        classes = plan.axes.classes
        others = [s for s in plan.axes.segments if s not in plan.prunable]
        return cls(classes.size(plan.axes.batch), plan.tokens, sum(map(classes.size, others)))

    def evaluate(self, formula: sympy.Expr, active: int | None = None) -> float:
        """A formula's value, at K = `active` if given, else at K = N."""
        known = {
            BATCH: self.batch,
            TOKENS: self.tokens,
            ACTIVE: self.tokens if active is None else active,
            TEXT: self.text,
        }
        return float(formula.xreplace({k: sympy.Integer(v) for k, v in known.items()}))


@dataclass(frozen=True)
class Work:
    """What one run of some nodes takes."""

    flops: sympy.Expr
    """A multiplication and an addition count as two; of products, attentions, convolutions."""
    moved: sympy.Expr
    """Bytes read from and written to memory if every region is one kernel: the least there is."""

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.moved + other.moved)


NOTHING = Work(ZERO, ZERO)


class CostModel:
    """Counts what nodes of one plan take, in a dense step and in a selective one."""

    def __init__(self, plan: SelectivePlan) -> None:
        self._plan = plan
        self.sizes = Sizes.of(plan)

    def dense(self, nodes: Collection[fx.Node]) -> Work:
        """All rows of a region."""
        flops = sum((self._flops(node, rows=False) for node in nodes), ZERO)
        values = [*_inputs(nodes), *_outputs(nodes)]
        moved = sum((self._bytes(value, rows=False) for value in values), ZERO)
        filled = [node for node in nodes if node not in self._plan.tabulated]
        return Work(flops, moved + self.caches(filled))

    def selective(self, nodes: Collection[fx.Node]) -> Work:
        """The rows that a selective step computes of a region."""
        plan = self._plan
        flops = sum((self._flops(n, rows=True) for n in nodes if self._as_rows(n)), ZERO)
        flops += sum((self._flops(n, rows=False) for n in nodes if self._as_whole(n)), ZERO)
        # what is known is an input of whatever reads it
        needed = [n for n in nodes if (n in plan.rows or n in plan.whole) and n not in plan.known]
        values = [*_inputs(needed), *_outputs(needed)]
        moved = sum((self._bytes(v, rows=v in plan.rows) for v in values), ZERO)
        cached = [n for n in nodes if n in plan.cached]
        written = sum((self._kept(n, rows=True) for n in cached), ZERO)
        return Work(flops, moved + written + self.caches(cached))

    def caches(self, nodes: Collection[fx.Node]) -> sympy.Expr:
        """Bytes of what is kept of a region between steps."""
        plan = self._plan
        held = (node for node in nodes if node in plan.cached or node in plan.fixed)
        tables = (self._bytes(node, rows=False) for node in nodes if node in plan.tabulated)
        return sum((self._kept(n, rows=False) for n in held), TIMES_AT_ONCE * sum(tables, ZERO))

    def flops(self, node: fx.Node) -> sympy.Expr:
        """All rows of one node."""
        return self._flops(node, rows=False)

    def _as_rows(self, node: fx.Node) -> bool:
        return node in self._plan.rows and self._plan.is_token_wise(node)

    def _as_whole(self, node: fx.Node) -> bool:
        plan = self._plan
        computed = node in plan.whole and node not in plan.cached and node not in plan.known
        return computed and plan.extracted_from(node) is None

    def _size(self, node: fx.Node, axis: int, rows: bool) -> sympy.Expr:
        """Positions along one axis, of the active tokens alone if `rows`."""
        plan, axes = self._plan, self._plan.axes
        if axis == axes.batch_axis(node):
            return BATCH
        layout = axes.layout(node, axis)
        if any(piece.segment not in axes.segments for piece in layout):
            return sympy.Integer(shape_of(node)[axis])
        image = TOKENS if not rows or axis != plan.token_axis(node) else ACTIVE
        prunable = sum(piece.length for piece in layout if piece.segment in plan.prunable)
        others = sum(piece.length for piece in layout) - prunable
        return image * sympy.Rational(prunable, plan.tokens) + (
            TEXT * sympy.Rational(others, self.sizes.text) if others else ZERO
        )

    def _elements(self, node: fx.Node, rows: bool) -> sympy.Expr:
        return sympy.Mul(*(self._size(node, axis, rows) for axis in range(rank_of(node))))

    def _bytes(self, node: fx.Node, rows: bool) -> sympy.Expr:
        return self._elements(node, rows) * node.meta["val"].dtype.itemsize

    def _kept(self, node: fx.Node, rows: bool) -> sympy.Expr:
        """Bytes of the tensors in which a value is kept between steps."""
        code = self._plan.codes.get(node)
        if code is None:
            return self._bytes(node, rows)
        scale = sympy.Rational(SCALE.itemsize, shape_of(node)[-1])
        return self._elements(node, rows) * (code.itemsize + scale)

    def _flops(self, node: fx.Node, rows: bool) -> sympy.Expr:
        if node.target is aten.linear.default:
            return 2 * self._elements(node, rows) * shape_of(operand_at(node, 1))[1]
        if node.target is ATTENTION:
            found = Attention.of(node)
            keys = self._size(found.key, rank_of(found.key) - 2, rows=False)
            elements = self._elements(found.query, rows) + self._elements(node, rows)
            return 2 * keys * elements
        if node.target in PRODUCTS:
            left = operand_at(node, 0)
            summed = self._size(left, rank_of(left) - 1, rows=False)
            return 2 * self._elements(node, rows) * summed
        if node.target in CONVOLUTIONS:
            return 2 * self._elements(node, rows) * prod(shape_of(operand_at(node, 1))[1:])
        return ZERO


class Arithmetic:
    """What it takes to compute values of one plan from the graph's inputs."""

    def __init__(self, plan: SelectivePlan) -> None:
        self._cost = CostModel(plan)
        self._known: dict[fx.Node, float] = {}

    def behind(self, node: fx.Node, known: Collection[fx.Node]) -> float:
        """FLOPs of a value and of all that it depends on and that is not known."""
        return sum(map(self.of, ancestors(node, known=set(known))))

    def of(self, node: fx.Node) -> float:
        """FLOPs of one node."""
        if node not in self._known:
            if node.target in FUNCTIONS:
                self._known[node] = FUNCTION_FLOPS * float(node.meta["val"].numel())
            else:
                self._known[node] = self._cost.sizes.evaluate(self._cost.flops(node))
        return self._known[node]


def _inputs(nodes: Collection[fx.Node]) -> list[fx.Node]:
    """Tensors that these nodes read from elsewhere, each once."""
    inside = set(nodes)
    read = {o: None for n in nodes for o in n.all_input_nodes if o not in inside and is_tensor(o)}
    return list(read)


def _outputs(nodes: Collection[fx.Node]) -> list[fx.Node]:
    """Those of these nodes that are read elsewhere."""
    inside = set(nodes)
    return [n for n in nodes if is_tensor(n) and not inside.issuperset(n.users)]
