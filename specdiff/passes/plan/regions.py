"""Regions: the attention and MLP subgraphs of a model, found from the graph alone.

Between the attentions and the residual additions lie token-wise connected components. A component
that feeds or drains an attention belongs to that attention's region; one with an activation between
linears is an MLP; what holds no tokens is modulation, or a table (of positions) if nothing in it is
learned. Regions carry their cost (`passes.plan.cost`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import networkx
import sympy
import torch
from torch import fx

from specdiff.passes.base import Pass, PassError
from specdiff.passes.plan.cost import NOTHING, CostModel, Work
from specdiff.passes.plan.residuals import PROJECTIONS, residual_additions
from specdiff.passes.plan.selective_plan import SelectivePlan
from specdiff.passes.plan.signature import module_path
from specdiff.passes.rules.attention import ATTENTION
from specdiff.passes.rules.registry import is_tensor
from specdiff.passes.rules.spatial import CONVOLUTIONS

aten = torch.ops.aten
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
    """attention, mlp, attention+mlp, modulation, table, embed, head or other."""
    path: str
    """Common module path of its nodes."""
    nodes: tuple[fx.Node, ...]
    cost: CostModel = field(repr=False)
    """Counts when it is asked: a compilation does not need to know."""

    @cached_property
    def dense(self) -> Work:
        """What a dense step takes, in B, N and T."""
        return self.cost.dense(self.nodes)

    @cached_property
    def selective(self) -> Work:
        """What a selective step takes, in B, N, K and T."""
        return self.cost.selective(self.nodes)

    @cached_property
    def cache_bytes(self) -> sympy.Expr:
        """Bytes of what is kept of it between steps, in B, N and T."""
        return self.cost.caches(self.nodes)

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
        residual = residual_additions(computed, tokens)
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

    def summary(self, result: tuple[Region, ...]) -> str:
        """How many regions of each kind."""
        kinds = Counter(region.kind for region in result)
        return ", ".join(f"{count} {kind}" for kind, count in kinds.items())

    def notes(self, result: tuple[Region, ...]) -> dict[fx.Node, str]:
        """The region of each node."""
        return {
            node: f"{number} {region.kind} {region.path}".rstrip()
            for number, region in enumerate(result)
            for node in region.nodes
        }


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


def _region(cost: CostModel, nodes: tuple[fx.Node, ...], kind: str) -> Region:
    paths = [path for node in nodes if (path := module_path(node))]
    return Region(kind, _common_path(paths), nodes, cost)


def _kind(plan: SelectivePlan, nodes: Sequence[fx.Node], tokens: set[fx.Node]) -> str:
    if set(plan.slots) & set(nodes):
        return "head"
    if not set(nodes) & tokens:
        if any(n.target in CONVOLUTIONS for n in nodes):
            return "embed"
        return "modulation" if any(n.target in PROJECTIONS for n in nodes) else "table"
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
