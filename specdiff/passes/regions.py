"""Regions: the attention and MLP subgraphs of a model, found from the graph alone.

Between the attentions and the residual additions lie token-wise connected components. A component
that feeds or drains an attention belongs to that attention's region; one with an activation between
linears is an MLP; what holds no tokens is modulation. Regions carry their cost (`passes.cost`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import networkx
import sympy
import torch
from torch import fx

from specdiff.passes.base import Pass, PassError
from specdiff.passes.cost import CONVOLUTIONS, NOTHING, CostModel, Work
from specdiff.passes.rules.attention import ATTENTION
from specdiff.passes.rules.registry import is_tensor, shape_of
from specdiff.passes.selective import SelectivePlan
from specdiff.passes.signature import module_path

aten = torch.ops.aten
ACTIVATIONS = (
    aten.gelu.default,
    aten.silu.default,
    aten.relu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.mish.default,
)
PROJECTIONS = (aten.linear.default, *CONVOLUTIONS)


@dataclass(frozen=True)
class Region:
    """A connected piece of the model."""

    kind: str
    """attention, mlp, attention+mlp, modulation, embed, head or other."""
    path: str
    """Common module path of its nodes."""
    nodes: tuple[fx.Node, ...]
    dense: Work
    """Of a dense step."""
    selective: Work
    """Of a selective step, in K."""
    cache_bytes: sympy.Expr

    @property
    def shrinks(self) -> bool:
        """Whether a selective step computes less of it than a dense one."""
        return bool(self.selective.flops != self.dense.flops)


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
        starts = {o for n in residual for o in n.all_input_nodes} - value.attention_dependent
        links.remove_nodes_from(residual)
        for node in computed:
            for operand in node.all_input_nodes:
                both = node in links and operand in links
                within = operand not in starts  # an embedding ends where the trunk begins
                if both and within and (node in tokens) == (operand in tokens):
                    links.add_edge(operand, node)
        connected = networkx.connected_components(links)
        components = [sorted(nodes, key=order.__getitem__) for nodes in connected]
        components.sort(key=lambda c: order[c[0]])
        cost = CostModel(value)
        return tuple(_region(cost, tuple(c), _kind(value, c, tokens)) for c in components)

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
            f"FLOPs: {r.dense.flops} dense, {r.selective.flops} selective"
            for r in result
        )


def dense_work(regions: Sequence[Region]) -> Work:
    """Of all regions, in B, N and T."""
    return sum((region.dense for region in regions), NOTHING)


def selective_work(regions: Sequence[Region]) -> Work:
    """Of all regions, in B, N, K and T."""
    return sum((region.selective for region in regions), NOTHING)


def _token_streams(plan: SelectivePlan, computed: list[fx.Node]) -> set[fx.Node]:
    """Values that hold tokens and learned features of them: not masks, nor position tables."""
    learned: set[fx.Node] = set()
    for node in computed:
        if node.target in PROJECTIONS or not learned.isdisjoint(node.all_input_nodes):
            learned.add(node)
    return {node for node in learned if plan.axes.axes_with(node, *plan.axes.segments)}


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


def _region(cost: CostModel, nodes: tuple[fx.Node, ...], kind: str) -> Region:
    paths = [path for node in nodes if (path := module_path(node))]
    return Region(
        kind,
        _common_path(paths),
        nodes,
        cost.dense(nodes),
        cost.selective(nodes),
        cost.caches(nodes),
    )


def _kind(plan: SelectivePlan, nodes: Sequence[fx.Node], tokens: set[fx.Node]) -> str:
    if set(plan.slots) & set(nodes):
        return "head"
    if not set(nodes) & tokens:
        return "embed" if any(n.target in CONVOLUTIONS for n in nodes) else "modulation"
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
