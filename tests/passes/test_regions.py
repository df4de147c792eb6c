"""Regions of FLUX and SD3.5: kinds, paths, and a cost model that agrees with a hand count."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from specdiff.passes.regions import ACTIVE, selective_flops
from specdiff.passes.rules.attention import ATTENTION
from tests.models import flux
from tests.oracles import trace

LAYERS, SINGLE, BATCH, TEXT, IMAGE, WIDTH = 2, 1, 2, 4, 42, 32


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


def test_regions_are_named_by_module(analysis):
    paths = Counter(r.path for r in analysis.regions if r.kind in ("attention", "mlp"))
    assert paths == {f"transformer_blocks.{block}": 3 for block in range(LAYERS)}
    (single,) = [r.path for r in analysis.regions if r.kind == "attention+mlp"]
    assert single == "single_transformer_blocks.0"


def test_dense_cost_is_a_hand_count(analysis):
    """Two FLOPs a multiplication; every linear once, every attention once."""
    both = TEXT + IMAGE
    square = 2 * BATCH * WIDTH * WIDTH
    attention = 2 * BATCH * both * both * 2 * WIDTH
    # q k v o and an MLP of four times the width, for text and image; modulation of both, by six
    double = both * square * (4 + 8) + attention + 2 * 6 * square
    # q k v, MLP in, and one projection out of five widths; modulation by three
    single = both * square * (3 + 4 + 5) + attention + 3 * square
    embed = 2 * BATCH * WIDTH * (IMAGE * 8 + TEXT * 24)
    conditioning = 2 * BATCH * WIDTH * (256 + WIDTH + 20 + WIDTH)
    head = 2 * square + 2 * BATCH * IMAGE * WIDTH * 8
    expected = LAYERS * double + SINGLE * single + embed + conditioning + head
    assert sum(region.dense_flops for region in analysis.regions) == expected


def test_every_linear_and_attention_lies_in_one_region(analysis):
    costly = [
        n
        for n in analysis.module.graph.nodes
        if n.target in (ATTENTION, torch.ops.aten.linear.default)
    ]
    held = Counter(node for region in analysis.regions for node in region.nodes)
    assert {held[node] for node in costly} == {1}


def test_all_active_costs_what_a_dense_step_costs(analysis):
    for region in analysis.regions:
        assert region.selective_flops.subs(ACTIVE, IMAGE) == region.dense_flops


def test_cost_falls_with_the_active_tokens(analysis):
    dense = sum(region.dense_flops for region in analysis.regions)
    costs = [selective_flops(analysis.regions, active) for active in (0, 10, 20, IMAGE)]
    assert costs == sorted(costs)
    assert len(set(costs)) == 4
    assert costs[-1] == dense
    # what is left at none: text, modulation, and nothing per image token
    both = TEXT + IMAGE
    text = costs[0] / dense
    assert TEXT / both < text < 0.5
