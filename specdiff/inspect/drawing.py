"""Drawing: a graph of `inspect.graph` in Graphviz's language, and as its program `dot` draws it."""

from __future__ import annotations

from collections.abc import Mapping

import graphviz
import networkx

COLOURS: Mapping[str, str] = {
    "attention": "#f4a582",
    "attention+mlp": "#e6b8d4",
    "mlp": "#92c5de",
    "modulation": "#e8e4c9",
    "table": "#e8e4c9",
    "embed": "#b8e0b0",
    "head": "#cdb5e6",
    "other": "#dddddd",
    "input": "#ffffff",
    "add": "#ffffff",
    "rows": "#b8e0b0",
    "cached": "#f4a582",
    "looked up": "#f0c9a0",
    "computed whole": "#eeeeee",
    "not needed": "#ffffff",
}
"""Fill colour of a node by its kind; the colours also differ in lightness."""
QUIET = ("modulation", "table")
PALE = "73"
"""Opacity of a box that is computed whole, as the last two digits of its colour."""
FONT = {"fontname": "Helvetica,Arial,sans-serif", "fontsize": "11", "fontcolor": "#222222"}
NODE = {**FONT, "shape": "box", "color": "#444444", "height": "0.1", "margin": "0.1,0.06"}
EDGE = {"color": "#888888", "arrowsize": "0.6"}
SHAPES: Mapping[str, Mapping[str, str]] = {
    "add": {"shape": "circle", "margin": "0", "width": "0.28", "fixedsize": "true"},
    "input": {"style": "filled,rounded"},
}


def to_dot(graph: networkx.DiGraph[str]) -> str:
    """The graph in Graphviz's language; wide boxes cost much, dashed ones are computed whole.

    Arrows from modulation and tables are left out, as they lead everywhere.
    """
    source = graphviz.Digraph(node_attr=NODE, edge_attr=EDGE)
    source.attr(ranksep="0.3", nodesep="0.2", bgcolor="transparent")
    for name, data in graph.nodes(data=True):
        source.node(name, _text(data["label"]), tooltip=_text(data["note"]), **_look(data))
    for a, b in graph.edges:
        if graph.nodes[a]["kind"] not in QUIET:
            source.edge(a, b)
    return str(source.source)


def to_svg(graph: networkx.DiGraph[str]) -> str | None:
    """The drawing, to be put into a page; None where `dot` is not installed."""
    try:
        drawn: str = graphviz.Source(to_dot(graph)).pipe(format="svg", encoding="utf-8")
    except graphviz.ExecutableNotFound:
        return None
    return drawn[drawn.index("<svg") :]


def _look(data: Mapping[str, object]) -> dict[str, str]:
    """Colour, frame and least width of a node, in inches."""
    kind, width = str(data["kind"]), f"{0.6 + 2.4 * float(str(data['weight'])):.2f}"
    fill = COLOURS.get(kind, COLOURS["other"])
    if data["whole"]:
        return {
            "fillcolor": fill + PALE, "style": "filled,dashed", "class": "whole", "width": width
        }  # fmt: skip
    return {"fillcolor": fill, "style": "filled", "width": width, **SHAPES.get(kind, {})}


def _text(text: object) -> str:
    """Text that Graphviz shows literally, with its line breaks."""
    escaped = graphviz.escape(str(text)).replace("\n", "\\n")
    plain: str = graphviz.nohtml(escaped)  # a kind of str that tells the writer so
    return plain
