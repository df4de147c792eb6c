"""Export: the drawings and the report of one analysed graph, as files and as artifacts of a trace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import networkx

from specdiff.inspect.graph import block_graph, block_path, region_graph
from specdiff.inspect.page import report_page
from specdiff.inspect.plain import to_json
from specdiff.inspect.svg import to_dot, to_svg
from specdiff.report import Report


def texts(report: Report) -> Iterator[tuple[str, str]]:
    """Names and contents of everything there is to look at; of a refused graph, the reason."""
    yield "report.json", json.dumps(to_json(report), indent=2) + "\n"
    if report.analysis is None:
        return
    regions = region_graph(report.analysis)
    block = block_graph(report.analysis, block_path(report.analysis))
    for name, graph in (("regions", regions), ("block", block)):
        yield f"{name}.dot", to_dot(graph)
        yield f"{name}.svg", to_svg(graph)
        yield f"{name}.graphml", "\n".join(networkx.generate_graphml(graph))
    yield "report.html", report_page(report)


def write(report: Report, folder: Path) -> None:
    """Each text as a file."""
    for name, text in texts(report):
        (folder / name).write_text(text, encoding="utf-8")
