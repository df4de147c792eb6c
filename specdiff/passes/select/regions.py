"""Regions: the attention and MLP subgraphs of a model, found from the graph alone.

Without its residual additions a graph falls into connected pieces, the regions. A region with an
attention is an attention; one with an activation is an MLP; one without tokens is a modulation, or
a table (of positions) if nothing in it is learned. A region knows its cost (`select.cost`).
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
from specdiff.passes.rules.attention import ATTENTION
from specdiff.passes.rules.registry import is_tensor
from specdiff.passes.rules.spatial import CONVOLUTIONS
from specdiff.passes.select.cost import NOTHING, CostModel, Work
from specdiff.passes.select.residuals import PROJECTIONS, residual_additions
from specdiff.passes.select.selection import Selection
from specdiff.passes.select.signature import module_path

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
    """Module path that its nodes share."""
    nodes: tuple[fx.Node, ...]
    cost: CostModel = field(repr=False)
    """Counts on demand: a compilation does not need the numbers."""

    @cached_property
    def dense_work(self) -> Work:
        """Cost of a dense step, in B, N and T."""
        return self.cost.dense_work(self.nodes)

    @cached_property
    def selective_work(self) -> Work:
        """Cost of a selective step, in B, N, K and T."""
        return self.cost.selective_work(self.nodes)

    @cached_property
    def cache_bytes(self) -> sympy.Expr:
        """Bytes that it stores between steps, in B, N and T."""
        return self.cost.caches(self.nodes)

    @property
    def shrinks(self) -> bool:
        """Whether a selective step computes less of it than a dense one."""
        return bool(self.selective_work.flops != self.dense_work.flops)


class RegionsPass(Pass[Selection, tuple[Region, ...]]):
    """Groups the nodes of a graph into regions, in graph order."""

    name = "regions"

    def apply(self, value: Selection) -> tuple[Region, ...]:
        """Remove residual additions, then take connected components."""
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
                within = operand not in starts  # an embedding ends where the blocks begin
                if both and within and (node in tokens) == (operand in tokens):
                    links.add_edge(operand, node)
        connected = networkx.connected_components(links)
        components = [sorted(nodes, key=order.__getitem__) for nodes in connected]
        components.sort(key=lambda c: order[c[0]])
        cost = CostModel(value)
        return tuple(_region(cost, tuple(c), _kind(value, c, tokens)) for c in components)

    def verify(self, value: Selection, result: tuple[Region, ...]) -> None:
        """Check that every attention lies in exactly one region."""
        members = [n for region in result for n in region.nodes]
        if len(members) != len(set(members)):
            raise PassError("two regions share a node")
        missing = {n for n in value.axes.graph.nodes if n.target is ATTENTION} - set(members)
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
    """Cost of all regions in a dense step, in B, N and T."""
    return sum((region.dense_work for region in regions), NOTHING)


def selective_work(regions: Sequence[Region]) -> Work:
    """Cost of all regions in a selective step, in B, N, K and T."""
    return sum((region.selective_work for region in regions), NOTHING)


def _token_streams(selection: Selection, computed: list[fx.Node]) -> set[fx.Node]:
    """Values that hold learned features of tokens; masks and position tables do not."""
    learned: set[fx.Node] = set()
    for node in computed:
        if node.target in PROJECTIONS or not learned.isdisjoint(node.all_input_nodes):
            learned.add(node)
    return {node for node in learned if selection.axes.axes_with(node, *selection.axes.segments)}


def _region(cost: CostModel, nodes: tuple[fx.Node, ...], kind: str) -> Region:
    paths = [path for node in nodes if (path := module_path(node))]
    return Region(kind, _common_path(paths), nodes, cost)


def _kind(selection: Selection, nodes: Sequence[fx.Node], tokens: set[fx.Node]) -> str:
    if set(selection.slots) & set(nodes):
        return "head"
    if not set(nodes) & tokens:
        if any(n.target in CONVOLUTIONS for n in nodes):
            return "embed"
        return "modulation" if any(n.target in PROJECTIONS for n in nodes) else "table"
    kinds = [
        *(["attention"] if any(n.target is ATTENTION for n in nodes) else []),
        *(["mlp"] if any(n.target in ACTIVATIONS for n in nodes) else []),
    ]
    if kinds:
        return "+".join(kinds)
    return "other" if set(nodes) & selection.attention_dependent else "embed"


def _common_path(paths: list[str]) -> str:
    """The longest module path that holds at least nine tenths of the nodes."""
    counts: dict[str, int] = defaultdict(int)
    for path in paths:
        pieces = path.split(".")
        for stop in range(1, len(pieces) + 1):
            counts[".".join(pieces[:stop])] += 1
    wide = [path for path, count in counts.items() if count >= 0.9 * len(paths)]
    return max(wide, key=len, default="")
