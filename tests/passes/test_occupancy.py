"""Programs with few rows on a GPU: the rewritten ops compute the same, and only where it pays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from specdiff.passes import occupancy
from specdiff.passes.occupancy import fill_processors, split_keys, sum_thin_linears
from specdiff.passes.rules.attention import ATTENTION

aten = torch.ops.aten
BF16 = {"rtol": 2e-2, "atol": 2e-2}


def traced(function, *values):
    """Its ATen graph, attention and linear whole."""
    return make_fx(function, tracing_mode="fake", pre_dispatch=True)(*values)


def attention(queries, keys=24, samples=2, dtype=torch.bfloat16):
    def random(rows):
        # stored as caches are: tokens before heads
        return torch.randn(samples, rows, 3, 16, dtype=dtype).transpose(1, 2)

    return random(queries), random(keys), random(keys)


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("samples", [1, 2])
def test_split_keys_are_the_same_attention(samples, scale):
    values = attention(5, samples=samples)
    program = traced(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=scale), *values)
    expected = program(*values)
    assert split_keys(program.graph, processors=24) == 1
    program.recompile()
    assert not program.graph.find_nodes(op="call_function", target=ATTENTION)
    torch.testing.assert_close(program(*values), expected, **BF16)


def test_parts_of_the_keys_fill_the_processors():
    values = attention(5, samples=1)
    program = traced(F.scaled_dot_product_attention, *values)
    [node] = program.graph.find_nodes(op="call_function", target=ATTENTION)
    # 3 heads: 8 parts are 24 tiles; 5 and 7 do not divide 24 keys
    assert [occupancy._parts(node, n) for n in (1, 3, 6, 9, 12, 24, 100)] == [1, 1, 2, 3, 4, 8, 8]


@pytest.mark.parametrize(
    "near_miss",
    [
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.ones(5, 24).bool()),
        lambda q, k, v: F.scaled_dot_product_attention(q.float(), k.float(), v.float()),
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, :23], v[:, :, :23]),
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True),
    ],
    ids=["causal", "masked", "float32", "indivisible", "grouped"],
)
def test_other_attentions_stay(near_miss):
    program = traced(near_miss, *attention(5))
    assert split_keys(program.graph, processors=132) == 0


@pytest.mark.parametrize("bias", [True, False])
def test_a_thin_linear_is_a_sum(bias, monkeypatch):
    monkeypatch.setattr(occupancy, "LEAST_WEIGHTS", 64)
    values = [torch.randn(2, 8), torch.randn(12, 8), torch.randn(12)][: 2 + bias]
    program = traced(F.linear, *values)
    expected = program(*values)
    assert sum_thin_linears(program.graph) == 1
    program.recompile()
    torch.testing.assert_close(program(*values), expected)


@pytest.mark.parametrize(("rows", "width"), [(3, 8), (2, 5)])
def test_linears_of_many_rows_or_few_weights_stay(rows, width, monkeypatch):
    monkeypatch.setattr(occupancy, "LEAST_WEIGHTS", 64)
    program = traced(F.linear, torch.randn(rows, width), torch.randn(12, width))
    assert sum_thin_linears(program.graph) == 0


def test_on_a_cpu_nothing_changes(monkeypatch):
    monkeypatch.setattr(occupancy, "LEAST_WEIGHTS", 64)
    program = traced(F.linear, torch.randn(2, 8), torch.randn(12, 8))
    before = program.code
    fill_processors(program)
    assert program.code == before
