"""Layout: a layered drawing of a directed graph (Sugiyama): arrows run down, few of them cross.

No drawing program is needed; the DOT files serve those who have one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import networkx

SWEEPS = 8
GAP = 16.0
ROW_GAP = 34.0
Dummy = tuple[str, str, int]
"""A bend of an edge where it passes a layer."""
Item = str | Dummy


@dataclass(frozen=True)
class Box:
    """Where a node is drawn: centre and size."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Layout:
    """Where everything is drawn, in a picture of this size."""

    boxes: dict[str, Box]
    edges: dict[tuple[str, str], list[tuple[float, float]]]
    """The points that an edge passes, from the lower side of a box to the upper of another."""
    width: float
    height: float


def layered(graph: networkx.DiGraph[str], sizes: dict[str, tuple[float, float]]) -> Layout:
    """Place the nodes of a graph; `sizes` are widths and heights.

    Arrows that close a circle run up: whole regions may wait for each other.
    """
    upward = _upward(graph)
    down: networkx.DiGraph[str] = networkx.DiGraph()
    down.add_nodes_from(graph)
    down.add_edges_from((b, a) if (a, b) in upward else (a, b) for a, b in graph.edges)
    layer = _layers(down)
    rows, links = _rows(down, layer)
    _untangle(rows, links)
    centres = _across(rows, links, sizes)
    heights = [max((sizes[i][1] for i in row if isinstance(i, str)), default=0.0) for row in rows]
    middles, top = [], GAP
    for height in heights:
        middles.append(top + height / 2)
        top += height + ROW_GAP
    boxes = {n: Box(centres[n], middles[layer[n]], *sizes[n]) for n in graph}
    edges = {
        (a, b): [
            (boxes[a].x, boxes[a].y + boxes[a].height / 2),
            *((centres[a, b, i], middles[i]) for i in range(layer[a] + 1, layer[b])),
            (boxes[b].x, boxes[b].y - boxes[b].height / 2),
        ]
        for a, b in down.edges
    }
    for a, b in upward:
        lower = edges[b, a] if (b, a) in graph.edges else edges.pop((b, a))
        edges[a, b] = lower[::-1]
    width = max((box.x + box.width / 2 for box in boxes.values()), default=0.0) + GAP
    return Layout(boxes, edges, width, top - ROW_GAP + GAP)


def _upward(graph: networkx.DiGraph[str]) -> set[tuple[str, str]]:
    """Edges within a circle that lead back, in the order of the nodes."""
    place = {node: i for i, node in enumerate(graph)}
    circle = {
        node: number
        for number, nodes in enumerate(networkx.strongly_connected_components(graph))
        for node in nodes
    }
    return {(a, b) for a, b in graph.edges if circle[a] == circle[b] and place[b] < place[a]}


def _layers(graph: networkx.DiGraph[str]) -> dict[str, int]:
    """The longest way to each node; one that nothing leads to is drawn above its first reader."""
    layer: dict[str, int] = {}
    for node in networkx.topological_sort(graph):
        layer[node] = max((layer[p] + 1 for p in graph.predecessors(node)), default=0)
    for node in graph:
        readers = [layer[reader] for reader in graph.successors(node)]
        if not graph.in_degree(node) and readers:
            layer[node] = min(readers) - 1
    return layer


def _rows(
    graph: networkx.DiGraph[str], layer: dict[str, int]
) -> tuple[list[list[Item]], networkx.Graph[Item]]:
    """What lies in each layer, bends of edges included, and what is linked to what."""
    rows: list[list[Item]] = [[] for _ in range(max(layer.values(), default=-1) + 1)]
    links: networkx.Graph[Item] = networkx.Graph()
    for node in graph:
        rows[layer[node]].append(node)
        links.add_node(node)
    for a, b in graph.edges:
        previous: Item = a
        for index in range(layer[a] + 1, layer[b]):
            bend = (a, b, index)
            rows[index].append(bend)
            links.add_edge(previous, bend)
            previous = bend
        links.add_edge(previous, b)
    return rows, links


def _untangle(rows: list[list[Item]], links: networkx.Graph[Item]) -> None:
    """Sort each layer by the mean place of its neighbours in the layer before, up and down."""
    for sweep in range(SWEEPS):
        ordered = rows if sweep % 2 == 0 else rows[::-1]
        for fixed, row in pairwise(ordered):
            place = {item: i for i, item in enumerate(fixed)}
            own = {item: i for i, item in enumerate(row)}
            means = {}
            for item in row:
                near = [place[other] for other in links[item] if other in place]
                means[item] = fmean(near) if near else float(own[item])
            row.sort(key=lambda item: (means[item], own[item]))


def _across(
    rows: list[list[Item]], links: networkx.Graph[Item], sizes: dict[str, tuple[float, float]]
) -> dict[Item, float]:
    """Horizontal centres: near those of their neighbours, in order, never overlapping."""
    half = {i: sizes[i][0] / 2 if isinstance(i, str) else 2.0 for row in rows for i in row}
    centres: dict[Item, float] = {}
    for row in rows:
        _pack(row, dict.fromkeys(row, 0.0), half, centres)
    for sweep in range(SWEEPS):
        for row in rows if sweep % 2 == 0 else rows[::-1]:
            wanted = {i: fmean([centres[n] for n in links[i]] or [centres[i]]) for i in row}
            _pack(row, wanted, half, centres)
    left = min((centres[item] - half[item] for item in centres), default=0.0)
    return {item: centre - left + GAP for item, centre in centres.items()}


def _pack(
    row: list[Item], wanted: dict[Item, float], half: dict[Item, float], centres: dict[Item, float]
) -> None:
    """The places nearest to those wanted that keep order and distance.

    Clusters that touch move as one (the pool of adjacent violators).
    """
    offsets, distance = {}, 0.0
    for previous, item in zip([None, *row], row, strict=False):
        distance += 0.0 if previous is None else half[previous] + half[item] + GAP
        offsets[item] = distance
    clusters: list[list[Item]] = []
    for item in row:
        clusters.append([item])
        while len(clusters) > 1 and _start(clusters[-2], wanted, offsets) > _start(
            clusters[-1], wanted, offsets
        ):
            clusters[-2:] = [clusters[-2] + clusters[-1]]
    for cluster in clusters:
        start = _start(cluster, wanted, offsets)
        for item in cluster:
            centres[item] = start + offsets[item]


def _start(cluster: list[Item], wanted: dict[Item, float], offsets: dict[Item, float]) -> float:
    return fmean(wanted[item] - offsets[item] for item in cluster)
