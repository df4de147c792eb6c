"""Drawings of graphs: what is in them, in every format, and what is said without Graphviz."""

from __future__ import annotations

import shutil
import xml.etree.ElementTree
from collections import Counter

import networkx
import pytest

from specdiff.inspect.drawing import QUIET, to_dot, to_svg
from specdiff.inspect.graph import block_graph, block_path, region_graph, short_count
from specdiff.inspect.page import report_page
from specdiff.inspect.report import report_of
from tests.models import flux
from tests.oracles import trace

LAYERS, SINGLE = 2, 1
with_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")


@pytest.fixture(scope="module")
def analysis():
    return trace(*flux(LAYERS, SINGLE)).analysis


def test_one_box_a_region(analysis):
    graph = region_graph(analysis)
    kinds = Counter(data["kind"] for _, data in graph.nodes(data=True))
    regions = Counter(region.kind for region in analysis.regions)
    assert {kind: kinds[kind] for kind in regions} == regions
    assert kinds["add"] == 4 * LAYERS + SINGLE
    labels = {data["label"] for _, data in graph.nodes(data=True) if data["kind"] == "input"}
    assert {"hidden_states", "encoder_hidden_states", "timestep", "output"} <= labels
    assert not any("weight" in label or "bias" in label for label in labels)


def test_everything_leads_from_the_inputs_to_the_output(analysis):
    graph = region_graph(analysis)
    assert networkx.is_directed_acyclic_graph(graph)
    reaching = networkx.ancestors(graph, "output") | {"output"}
    assert reaching == set(graph)


def test_whole_regions_are_told_apart_and_costly_ones_are_wide(analysis):
    graph = region_graph(analysis)
    for _, data in graph.nodes(data=True):
        if data["kind"] == "modulation":
            assert data["whole"]
        if data["kind"] in ("attention", "attention+mlp"):
            assert not data["whole"]
    by_cost = sorted(
        (d["dense_flops"], d["weight"]) for _, d in graph.nodes(data=True) if "dense_flops" in d
    )
    weights = [weight for _, weight in by_cost]
    assert weights == sorted(weights) and weights[-1] == 1
    whole = sum(data["whole"] for _, data in graph.nodes(data=True))
    assert to_dot(graph).count("class=whole") == whole > 0


def test_a_block_in_full(analysis):
    path = block_path(analysis)
    assert path == "transformer_blocks.0"
    graph = block_graph(analysis, path)
    kinds = Counter(data["kind"] for _, data in graph.nodes(data=True))
    assert kinds["cached"] == 2  # key and value
    assert kinds["rows"] > 10 and kinds["computed whole"] > 10
    computed = [data for _, data in graph.nodes(data=True) if data["kind"] != "input"]
    ops = Counter(data["label"].split("\n")[0] for data in computed)
    assert ops["scaled_dot_product_attention"] == 1
    assert ops["linear"] == 14  # q k v o and an MLP for each stream, and two modulations


def one_box() -> tuple[networkx.DiGraph, str]:
    graph, label = networkx.DiGraph(), '<a "b">\n<c> & \\d>'
    graph.add_node("x", label=label, kind="other", weight=0.5, whole=True, note=label)
    return graph, label


def test_labels_survive_as_graphml(tmp_path):
    graph, label = one_box()
    networkx.write_graphml(graph, tmp_path / "x.graphml")
    assert networkx.read_graphml(tmp_path / "x.graphml").nodes["x"]["label"] == label


@with_dot
def test_labels_survive_drawing():
    graph, label = one_box()
    root = xml.etree.ElementTree.fromstring(to_svg(graph))
    texts = [element.text for element in root.iter() if element.tag.endswith("}text")]
    assert texts == label.split("\n")


@with_dot
def test_boxes_and_arrows_are_drawn(analysis):
    graph = region_graph(analysis)
    drawn = to_svg(graph)
    loud = [a for a, _ in graph.edges if graph.nodes[a]["kind"] not in QUIET]
    assert drawn.count('class="node') == len(graph)
    assert drawn.count('class="edge') == len(loud) > len(graph) / 2
    whole = sum(data["whole"] for _, data in graph.nodes(data=True))
    assert drawn.count('class="node whole"') == whole > 0


def test_without_graphviz_the_page_says_what_installs_it(analysis, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert to_svg(region_graph(analysis)) is None
    page = report_page(report_of(analysis))
    assert "<svg" not in page
    assert page.count("apt-get install graphviz") == page.count("digraph {") == 2


def test_counts_are_short():
    assert short_count(0, "B") == "0 B"
    assert short_count(999, "B") == "999 B"
    assert short_count(16_520_000_000, "FLOP") == "16.5 GFLOP"
    assert short_count(5e18, "B").endswith(" TB")
