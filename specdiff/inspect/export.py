"""Export: the drawings and the report of one analysed graph, as named texts."""

from __future__ import annotations

import json
from collections.abc import Iterator

import networkx

from specdiff.inspect.drawing import to_dot, to_svg
from specdiff.inspect.graph import block_graph, block_path, region_graph
from specdiff.inspect.page import report_page
from specdiff.inspect.plain import to_json
from specdiff.inspect.report import report_of
from specdiff.options import Options
from specdiff.pipeline import Analysis


def texts(analysis: Analysis | str, options: Options) -> Iterator[tuple[str, str]]:
    """Names and contents of all files about a graph; for a refused graph, just the reason.

    Without Graphviz there are no drawings: the report says so and holds their sources.
    """
    report = report_of(analysis, options)
    yield "report.json", json.dumps(to_json(report), indent=2) + "\n"
    if report.analysis is None:
        return
    regions = region_graph(report.analysis)
    block = block_graph(report.analysis, block_path(report.analysis))
    for name, graph in (("regions", regions), ("block", block)):
        yield f"{name}.dot", to_dot(graph)
        if drawn := to_svg(graph):
            yield f"{name}.svg", drawn
        yield f"{name}.graphml", "\n".join(networkx.generate_graphml(graph))
    yield "report.html", report_page(report)
