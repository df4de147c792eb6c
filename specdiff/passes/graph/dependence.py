"""What a value depends on, and what depends on it."""

from __future__ import annotations

from collections.abc import Container, Iterable

from torch import fx


def ancestors(*targets: fx.Node, known: Container[fx.Node] = ()) -> list[fx.Node]:
    """The targets and all that they depend on, in graph order; known nodes are left out."""
    reached: set[fx.Node] = set()
    pending = list(targets)
    while pending:
        node = pending.pop()
        if node not in reached and node not in known:
            reached.add(node)
            pending += node.all_input_nodes
    return [node for node in targets[0].graph.nodes if node in reached]


def descendants(graph: fx.Graph, sources: Iterable[fx.Node]) -> set[fx.Node]:
    """The sources and everything that depends on one of them."""
    reached = set(sources)
    for node in graph.nodes:
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return reached
