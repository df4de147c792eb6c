"""SVG and DOT text of a graph that `inspect.graph` made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape

import networkx

from specdiff.inspect.layout import Box, layered

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
"""Fill of a node by its kind; of tones that differ in lightness, too."""
QUIET = ("modulation", "table")
LINE = 13
LETTER = 6.3
STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#222;text-anchor:middle}"
    "rect,circle{stroke:#444;stroke-width:1}.whole{stroke-dasharray:4 3;fill-opacity:.45}"
    "path{fill:none;stroke:#888;stroke-width:1}"
)


def to_svg(graph: networkx.DiGraph[str]) -> str:
    """A drawing; wide boxes are costly, dashed ones are computed whole at every step.

    Arrows out of modulation and tables are left out: they lead everywhere.
    """
    drawn = networkx.DiGraph(graph)
    drawn.remove_edges_from([e for e in graph.edges if graph.nodes[e[0]]["kind"] in QUIET])
    places = layered(drawn, {n: _size(data) for n, data in graph.nodes(data=True)})
    parts = [*_arrows(places.edges), *_nodes(graph, places.boxes)]
    size = f'width="{places.width:.0f}" height="{places.height:.0f}"'
    box = f'viewBox="0 0 {places.width:.0f} {places.height:.0f}"'
    marker = (
        '<marker id="tip" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="6" markerHeight="6"'
        ' orient="auto"><path d="M0 0L6 3L0 6z" style="fill:#888"/></marker>'
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {box}>'
    return "\n".join([head, f"<style>{STYLE}</style><defs>{marker}</defs>", *parts, "</svg>\n"])


def _size(data: Mapping[str, object]) -> tuple[float, float]:
    lines = str(data["label"]).split("\n")
    if data["kind"] == "add":
        return 20.0, 20.0
    least = max(len(line) for line in lines) * LETTER + 14
    return max(least, 60 + 240 * float(str(data["weight"]))), len(lines) * LINE + 9.0


def _arrows(edges: Mapping[tuple[str, str], list[tuple[float, float]]]) -> Iterator[str]:
    for points in edges.values():
        (x, y), *rest = points
        path = [f"M{x:.0f} {y:.0f}"]
        for a, b in rest:
            middle = (y + b) / 2
            path.append(f"C{x:.0f} {middle:.0f} {a:.0f} {middle:.0f} {a:.0f} {b:.0f}")
            x, y = a, b
        yield f'<path d="{"".join(path)}" marker-end="url(#tip)"/>'


def _nodes(graph: networkx.DiGraph[str], boxes: Mapping[str, Box]) -> Iterator[str]:
    for name, data in graph.nodes(data=True):
        box, lines = boxes[name], str(data["label"]).split("\n")
        style = ' class="whole"' if data["whole"] else ""
        fill = COLOURS.get(str(data["kind"]), COLOURS["other"])
        corner = box.height / 2 if data["kind"] in ("add", "input") else 4
        yield f"<g><title>{escape(str(data['note']))}</title>"
        yield (
            f'<rect x="{box.x - box.width / 2:.0f}" y="{box.y - box.height / 2:.0f}"'
            f' width="{box.width:.0f}" height="{box.height:.0f}" rx="{corner:.0f}"'
            f' fill="{fill}"{style}/>'
        )
        top = box.y - (len(lines) - 1) * LINE / 2 + 4
        for i, line in enumerate(lines):
            yield f'<text x="{box.x:.0f}" y="{top + i * LINE:.0f}">{escape(line)}</text>'
        yield "</g>"


def to_dot(graph: networkx.DiGraph[str]) -> str:
    """The same for Graphviz: `dot -Tsvg`."""
    lines = ["digraph {", '  node [shape=box style=filled fontname="sans-serif"];']
    for name, data in graph.nodes(data=True):
        fill = COLOURS.get(str(data["kind"]), COLOURS["other"])
        style = "filled,dashed" if data["whole"] else "filled"
        width = 0.8 + 2.4 * float(data["weight"])
        lines.append(
            f"  {_quoted(name)} [label={_quoted(data['label'])} tooltip={_quoted(data['note'])}"
            f' fillcolor="{fill}" style="{style}" width={width:.2f}];'
        )
    for a, b in graph.edges:
        faint = ' [color="#cccccc" constraint=false]' if graph.nodes[a]["kind"] in QUIET else ""
        lines.append(f"  {_quoted(a)} -> {_quoted(b)}{faint};")
    return "\n".join([*lines, "}\n"])


def _quoted(text: object) -> str:
    escaped = str(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
