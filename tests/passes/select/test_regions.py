"""Regions of FLUX and SD3.5: kinds, paths, and a cost model that agrees with a hand count."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from specdiff.passes.rules.attention import ATTENTION
from specdiff.passes.select.cost import ACTIVE, BATCH, TOKENS, Sizes
from specdiff.passes.select.cost import TEXT as TEXT_TOKENS
from specdiff.passes.select.regions import dense_work, selective_work
from tests.models import flux, sd3
from tests.oracles import trace

LAYERS, SINGLE, SAMPLES, TEXT, IMAGE, WIDTH = 2, 1, 2, 4, 42, 32


@pytest.fixture(scope="module")
def analysis():
    model, inputs = flux(LAYERS, SINGLE)
    return trace(model, inputs).analysis


def test_kinds(analysis):
    kinds = Counter(region.kind for region in analysis.regions)
    assert kinds["attention"] == LAYERS
    assert kinds["mlp"] == 2 * LAYERS
    assert kinds["attention+mlp"] == SINGLE
    assert kinds["head"] == 1
    assert kinds["embed"] == 2


def test_an_embedding_ends_where_the_trunk_begins(analysis):
    paths = {region.path for region in analysis.regions if region.kind == "embed"}
    assert paths == {"x_embedder", "context_embedder"}


def test_regions_are_named_by_module(analysis):
    paths = Counter(r.path for r in analysis.regions if r.kind in ("attention", "mlp"))
    assert paths == {f"transformer_blocks.{block}": 3 for block in range(LAYERS)}
    (single,) = [r.path for r in analysis.regions if r.kind == "attention+mlp"]
    assert single == "single_transformer_blocks.0"


def test_dense_cost_is_a_hand_count(analysis):
    """Two FLOPs a multiplication; every linear once, every attention once."""
    both = TEXT + IMAGE
    square = 2 * SAMPLES * WIDTH * WIDTH
    attention = 2 * SAMPLES * both * both * 2 * WIDTH
    # q k v o and an MLP of four times the width, for text and image; modulation of both, by six
    double = both * square * (4 + 8) + attention + 2 * 6 * square
    # q k v, MLP in, and one projection out of five widths; modulation by three
    single = both * square * (3 + 4 + 5) + attention + 3 * square
    embed = 2 * SAMPLES * WIDTH * (IMAGE * 8 + TEXT * 24)
    conditioning = 2 * SAMPLES * WIDTH * (256 + WIDTH + 20 + WIDTH)
    head = 2 * square + 2 * SAMPLES * IMAGE * WIDTH * 8
    expected = LAYERS * double + SINGLE * single + embed + conditioning + head
    assert sizes(analysis).evaluate(dense_work(analysis.regions).flops) == expected


def test_every_linear_and_attention_lies_in_one_region(analysis):
    costly = [
        n
        for n in analysis.module.graph.nodes
        if n.target in (ATTENTION, torch.ops.aten.linear.default)
    ]
    held = Counter(node for region in analysis.regions for node in region.nodes)
    assert {held[node] for node in costly} == {1}


def sizes(analysis) -> Sizes:
    return Sizes.of(analysis.selection)


def test_all_active_costs_what_a_dense_step_costs(analysis):
    for region in analysis.regions:
        assert region.selective_work.flops.subs(ACTIVE, TOKENS).equals(region.dense_work.flops)


def test_cost_falls_with_the_active_tokens(analysis):
    flops = selective_work(analysis.regions).flops
    dense = sizes(analysis).evaluate(dense_work(analysis.regions).flops)
    costs = [sizes(analysis).evaluate(flops, active) for active in (0, 10, 20, IMAGE)]
    assert costs == sorted(costs)
    assert len(set(costs)) == 4
    assert costs[-1] == dense
    # what is left at none: text, modulation, and nothing per image token
    both = TEXT + IMAGE
    text = costs[0] / dense
    assert TEXT / both < text < 0.5


def test_what_shrinks_is_what_holds_image_tokens(analysis):
    kinds = {region.kind: region.shrinks for region in analysis.regions if region.kind != "mlp"}
    assert kinds == {
        "embed": False,  # of the text, the last one
        "modulation": False,
        "table": False,
        "attention": True,
        "attention+mlp": True,
        "head": True,
    }
    mlps = Counter(region.shrinks for region in analysis.regions if region.kind == "mlp")
    assert mlps == {True: LAYERS, False: LAYERS}


@pytest.mark.parametrize(
    ("part", "form"),
    [
        ("flops", "selective_work"),
        ("moved", "dense_work"),
        pytest.param("flops", "dense_work", marks=pytest.mark.slow),
        pytest.param("moved", "selective_work", marks=pytest.mark.slow),
    ],
)
def test_formulas_hold_at_other_sizes(analysis, form, part):
    """What one trace says in B, N and T is what a trace at those sizes counts."""
    model, inputs = flux(LAYERS, SINGLE, rows=3, columns=5, text=7, batch=3)
    other = trace(model, inputs).analysis
    there = sizes(other)
    assert there == Sizes(batch=3, tokens=15, text=7)
    for here, region in zip(analysis.regions, other.regions, strict=True):
        if part == "moved" and region.path == "pos_embed":
            continue  # nothing proves that the ids, from which rotations are made, are tokens
        formula, expected = (getattr(getattr(r, form), part) for r in (here, region))
        for active in (0, 6, 15):
            assert there.evaluate(formula, active) == there.evaluate(expected, active)


def test_caches_are_those_of_the_signature(analysis):
    held = sum(region.cache_bytes for region in analysis.regions)
    assert sizes(analysis).evaluate(held) == analysis.signature.cache_bytes


def test_memory_traffic_of_one_region_is_a_hand_count(analysis):
    """The text's embedding: tokens in and out, weight and bias."""
    (region,) = [r for r in analysis.regions if r.path == "context_embedder"]
    expected = 4 * (BATCH * TEXT_TOKENS * (24 + WIDTH) + WIDTH * 24 + WIDTH)
    assert region.dense_work.moved.equals(expected)
    assert region.selective_work.moved.equals(expected)


def test_convolutions_count():
    """SD3 embeds patches: of a latent [B, 4, 12, 16] in squares of two."""
    model, inputs = sd3()
    found = trace(model, inputs).analysis
    (embed,) = [
        r for r in found.regions if r.kind == "embed" and r.path.startswith("pos_embed.proj")
    ]
    width = model.config.num_attention_heads * model.config.attention_head_dim
    patches, channels = 6 * 8, inputs["hidden_states"].shape[1]
    assert sizes(found).evaluate(embed.dense_work.flops) == 2 * 2 * patches * width * channels * 4
