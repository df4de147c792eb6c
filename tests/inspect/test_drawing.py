"""Drawings of graphs: what is in them, that boxes do not overlap, that arrows run down."""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess
import xml.etree.ElementTree
from collections import Counter

import networkx
import pytest

from specdiff.inspect.graph import block_graph, block_path, region_graph, short_count
from specdiff.inspect.layout import Layout, layered
from specdiff.inspect.svg import to_dot, to_svg
from tests.models import flux
from tests.oracles import trace

LAYERS, SINGLE = 2, 1


@pytest.fixture(scope="module")
def analysis():
    return trace(*flux(LAYERS, SINGLE)).analysis


def random_graph(seed: int, nodes: int = 40) -> networkx.DiGraph:
    """Acyclic, every node but the first with one to three parents."""
    generator = random.Random(seed)
    graph = networkx.DiGraph()
    graph.add_node("0")
    for node in range(1, nodes):
        for parent in generator.sample(range(node), min(node, generator.randint(1, 3))):
            graph.add_edge(str(parent), str(node))
    return graph


def layout_of(graph: networkx.DiGraph) -> Layout:
    return layered(graph, {node: (40 + 7 * int(node) % 90, 20.0) for node in graph})


@pytest.mark.parametrize("seed", range(5))
def test_boxes_do_not_overlap_and_lie_in_the_picture(seed):
    found = layout_of(random_graph(seed))
    for one, other in itertools.combinations(found.boxes.values(), 2):
        apart = abs(one.x - other.x) >= (one.width + other.width) / 2
        assert apart or abs(one.y - other.y) >= (one.height + other.height) / 2
    for box in found.boxes.values():
        assert box.width / 2 <= box.x <= found.width - box.width / 2
        assert box.height / 2 <= box.y <= found.height - box.height / 2


@pytest.mark.parametrize("seed", range(5))
def test_arrows_run_down_from_box_to_box(seed):
    graph = random_graph(seed)
    found = layout_of(graph)
    assert set(found.edges) == set(graph.edges)
    for (a, b), points in found.edges.items():
        assert points[0][0] == found.boxes[a].x and points[-1][0] == found.boxes[b].x
        heights = [y for _, y in points]
        assert heights == sorted(heights) and heights[0] < heights[-1]


def test_sorting_leaves_fewer_crossings_than_chance():
    """Two ladders side by side need none."""
    graph = networkx.DiGraph()
    for rung in range(6):
        for side in ("a", "b"):
            graph.add_edge(f"{side}{rung}", f"{side}{rung + 1}")
    found = layered(graph, dict.fromkeys(graph, (30.0, 20.0)))
    sides = {side: [found.boxes[f"{side}{r}"].x for r in range(7)] for side in "ab"}
    left, right = sorted(sides.values())
    assert max(left) < min(right)


@pytest.mark.parametrize("edges", [["01", "12", "20"], ["01", "10"], ["01", "12", "21", "23"]])
def test_arrows_that_close_a_circle_run_up(edges):
    graph = networkx.DiGraph([tuple(edge) for edge in edges])
    found = layout_of(graph)
    assert set(found.edges) == set(graph.edges)
    for (a, b), points in found.edges.items():
        assert (points[0][1] < points[-1][1]) == (a < b)


def test_a_chain_is_straight():
    graph = networkx.path_graph([str(i) for i in range(5)], create_using=networkx.DiGraph)
    assert len({box.x for box in layout_of(graph).boxes.values()}) == 1


def test_an_empty_graph_is_an_empty_picture():
    assert layered(networkx.DiGraph(), {}).boxes == {}


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
    texts = to_svg(graph), to_dot(graph)
    whole = sum(data["whole"] for _, data in graph.nodes(data=True))
    assert texts[0].count('class="whole"') == texts[1].count("filled,dashed") == whole > 0


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


def test_labels_survive_every_format(tmp_path):
    graph = networkx.DiGraph()
    label = 'a "b"\n<c> & \\d'
    graph.add_node("x", label=label, kind="other", weight=0.5, whole=True, note=label)
    root = xml.etree.ElementTree.fromstring(to_svg(graph))
    texts = [e.text for e in root.iter() if e.tag.endswith("}text")]
    assert texts == label.split("\n")
    networkx.write_graphml(graph, tmp_path / "x.graphml")
    assert networkx.read_graphml(tmp_path / "x.graphml").nodes["x"]["label"] == label
    assert 'label="a \\"b\\"\\n<c> & \\\\d"' in to_dot(graph)


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
def test_graphviz_takes_the_dot_file(analysis):
    text = to_dot(region_graph(analysis))
    drawn = subprocess.run(["dot", "-Tsvg"], input=text, capture_output=True, text=True, check=True)
    assert drawn.stdout.count('class="node"') == len(region_graph(analysis))


def test_counts_are_short():
    assert short_count(0, "B") == "0 B"
    assert short_count(999, "B") == "999 B"
    assert short_count(16_520_000_000, "FLOP") == "16.5 GFLOP"
    assert short_count(5e18, "B").endswith(" TB")
