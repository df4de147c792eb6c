"""Regions: the attention and MLP subgraphs of a model, found from the graph alone.

Between the attentions and the residual additions lie token-wise connected components. A component
that feeds or drains an attention belongs to that attention's region; one with an activation between
linears is an MLP; what holds no tokens is modulation. Regions carry their cost: FLOPs of a dense
step, and of a selective step as a formula in K, the number of active tokens.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import networkx
import sympy
import torch
from torch import fx

from specdiff.passes.base import Pass, PassError
from specdiff.passes.rules.attention import ATTENTION, Attention
from specdiff.passes.rules.registry import is_tensor, operand_at, shape_of
from specdiff.passes.selective import SelectivePlan
from specdiff.passes.signature import module_path

aten = torch.ops.aten
ACTIVE = sympy.Symbol("K", integer=True, nonnegative=True)
ACTIVATIONS = (
    aten.gelu.default,
    aten.silu.default,
    aten.relu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.mish.default,
)


@dataclass(frozen=True)
class Region:
    """A connected piece of the model."""

    kind: str
    """attention, mlp, attention+mlp, modulation, embed, head or other."""
    path: str
    """Common module path of its nodes."""
    nodes: tuple[fx.Node, ...]
    dense_flops: int
    selective_flops: sympy.Expr
    """In K."""


class RegionsPass(Pass[SelectivePlan, tuple[Region, ...]]):
    """Groups the nodes of a plan into regions, in graph order."""

    name = "regions"

    def apply(self, value: SelectivePlan) -> tuple[Region, ...]:
        """Connected components between attentions and residual additions."""
        graph = value.axes.graph
        order = {node: i for i, node in enumerate(graph.nodes)}
        links: networkx.Graph[fx.Node] = networkx.Graph()
        computed = [n for n in graph.nodes if n.op == "call_function" and is_tensor(n)]
        links.add_nodes_from(computed)
        tokens = _token_streams(value, computed)
        residual = {n for n in tokens if _is_residual(n, tokens)}
        links.remove_nodes_from(residual)
        for node in computed:
            for operand in node.all_input_nodes:
                both = node in links and operand in links
                if both and (node in tokens) == (operand in tokens):
                    links.add_edge(operand, node)
        connected = networkx.connected_components(links)
        components = [sorted(nodes, key=order.__getitem__) for nodes in connected]
        components.sort(key=lambda c: order[c[0]])
        return tuple(_region(value, tuple(nodes), tokens) for nodes in components)

    def verify(self, value: SelectivePlan, result: tuple[Region, ...]) -> None:
        """Every attention lies in exactly one region."""
        found = [n for region in result for n in region.nodes]
        if len(found) != len(set(found)):
            raise PassError("two regions share a node")
        missing = {n for n in value.axes.graph.nodes if n.target is ATTENTION} - set(found)
        if missing:
            raise PassError(f"no region holds {', '.join(n.name for n in missing)}")

    def render(self, result: tuple[Region, ...]) -> str:
        """One line a region."""
        return "\n".join(
            f"{r.kind:14} {r.path or '-':40} {len(r.nodes):4} nodes "
            f"{r.dense_flops / 1e6:10.2f} MFLOP dense, {r.selective_flops} selective"
            for r in result
        )


def selective_flops(regions: tuple[Region, ...], active: int) -> int:
    """FLOPs of a selective step with `active` tokens."""
    total = sympy.Add(*(region.selective_flops for region in regions))
    return int(total.subs(ACTIVE, active))


def _token_streams(plan: SelectivePlan, computed: list[fx.Node]) -> set[fx.Node]:
    """Values that hold tokens and learned features of them: not masks, nor position tables."""
    streams: set[fx.Node] = set()
    for node in computed:
        if not any(plan.axes.axes_with(node, segment) for segment in plan.axes.segments):
            continue
        if node.target is aten.linear.default or any(o in streams for o in node.all_input_nodes):
            streams.add(node)
    return streams


def _is_residual(node: fx.Node, tokens: set[fx.Node]) -> bool:
    """An addition to the trunk that all blocks share: a gated or plain linear's output is added.

    RoPE, too, adds two token values, but neither is a linear's output.
    """
    if node.target is not aten.add.Tensor:
        return False
    operands = [o for o in node.args[:2] if isinstance(o, fx.Node)]
    same = all(o in tokens and shape_of(o) == shape_of(node) for o in operands)
    return len(operands) == 2 and same and any(_is_branch_end(o) for o in operands)


def _is_branch_end(node: fx.Node) -> bool:
    while node.target in (aten.mul.Tensor, aten.dropout.default, aten.div.Tensor):
        streams = [o for o in node.all_input_nodes if shape_of(o) == shape_of(node)]
        if len(streams) != 1:
            return False
        node = streams[0]
    return node.target is aten.linear.default


def _region(plan: SelectivePlan, nodes: tuple[fx.Node, ...], tokens: set[fx.Node]) -> Region:
    dense, selective = 0, sympy.Integer(0)
    for node in nodes:
        full = _flops(node)
        dense += full
        if node in plan.rows and plan.is_token_wise(node):
            selective += full * _row_share(plan, node)
        elif node in plan.rows or node in plan.whole:
            selective += full
    paths = [path for node in nodes if (path := module_path(node))]
    return Region(_kind(plan, nodes, tokens), _common_path(paths), nodes, dense, selective)


def _row_share(plan: SelectivePlan, node: fx.Node) -> sympy.Expr:
    """Share of the rows of `node` that a selective step computes, in K."""
    layout = plan.layout(node)
    prunable = sum(piece.length for piece in layout if piece.segment in plan.prunable)
    others = sum(piece.length for piece in layout) - prunable
    active = ACTIVE * sympy.Rational(prunable, plan.tokens)
    return (active + others) / (prunable + others)


def _flops(node: fx.Node) -> int:
    """FLOPs of all rows of a node."""
    if node.target is aten.linear.default:
        columns = shape_of(operand_at(node, 1))[1]
        return int(2 * node.meta["val"].numel() * columns)
    if node.target is ATTENTION:
        found = Attention.of(node)
        keys = shape_of(found.key)[-2]
        return int(2 * keys * (found.query.meta["val"].numel() + node.meta["val"].numel()))
    return 0


def _kind(plan: SelectivePlan, nodes: tuple[fx.Node, ...], tokens: set[fx.Node]) -> str:
    if set(plan.slots) & set(nodes):
        return "head"
    if not set(nodes) & tokens:
        return "modulation"
    attention = any(n.target is ATTENTION for n in nodes)
    mlp = any(n.target in ACTIVATIONS for n in nodes)
    if attention or mlp:
        return "+".join(name for name, found in (("attention", attention), ("mlp", mlp)) if found)
    return "other" if set(nodes) & plan.attention_dependent else "embed"


def _common_path(paths: list[str]) -> str:
    """The longest module path that holds at least nine tenths of the nodes."""
    counts: dict[str, int] = defaultdict(int)
    for path in paths:
        pieces = path.split(".")
        for stop in range(1, len(pieces) + 1):
            counts[".".join(pieces[:stop])] += 1
    wide = [path for path, count in counts.items() if count >= 0.9 * len(paths)]
    return max(wide, key=len, default="")
