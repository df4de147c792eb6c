"""Each rule on a graph of one op: which axes are one, and near misses that must not be."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from specdiff.passes.base import PassError
from specdiff.passes.normalize.normalize import replace_tuples
from specdiff.passes.rules import facts_of
from specdiff.passes.rules.registry import operand_at, operands_at
from specdiff.passes.rules.shape import aligned_axes

B, N, C = 2, 6, 8


def facts(function, *shapes):
    """Facts of the last op: links as (out axis, input, in axis), parts as (whole, part, offset)."""
    inputs = [torch.randn(shape) for shape in shapes]
    with torch.no_grad():
        module = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*inputs)
    replace_tuples(module.graph)
    module.graph.eliminate_dead_code()
    *_, last, _ = module.graph.nodes
    names = {n: i for i, n in enumerate(module.graph.find_nodes(op="placeholder"))}
    names[last] = "out"
    found = facts_of(last)
    links = {(x.out_axis, names[x.operand], x.in_axis) for x in found.links}
    parts = {
        ((names[p.whole[0]], p.whole[1]), (names[p.part[0]], p.part[1]), p.offset)
        for p in found.parts
    }
    return links, parts


def same(*axes):
    """Links that keep each axis of input 0 in its place."""
    return {(a, 0, a) for a in axes}


X = (B, N, C)
LINKS = {
    "pointwise": (lambda x: x.sin(), (X,), same(0, 1, 2)),
    "broadcast table": (lambda x, t: x + t, (X, (N, 1)), same(0, 1, 2) | {(1, 1, 0)}),
    "broadcast over tokens": (
        lambda x, m: x * m, (X, (B, 1, C)), same(0, 1, 2) | {(0, 1, 0), (2, 1, 2)},
    ),
    "linear": (F.linear, (X, (C, C)), same(0, 1)),
    "square linear keeps no channel": (F.linear, ((B, N, N), (N, N)), same(0, 1)),
    "layer_norm": (lambda x: F.layer_norm(x, (C,)), (X,), same(0, 1)),
    "layer_norm over tokens": (lambda x: F.layer_norm(x, (N, C)), (X,), same(0)),
    "rms_norm": (lambda x: F.rms_norm(x, (C,)), (X,), same(0, 1)),
    "softmax": (lambda x: x.softmax(-1), (X,), same(0, 1)),
    "softmax over tokens": (lambda x: x.softmax(1), (X,), same(0, 2)),
    "mean over channels": (lambda x: x.mean(-1), (X,), same(0, 1)),
    "mean over tokens": (lambda x: x.mean(1), (X,), {(0, 0, 0), (1, 0, 2)}),
    "mean over tokens, kept": (lambda x: x.mean(1, keepdim=True), (X,), same(0, 2)),
    "sum of all": (lambda x: x.sum((0, 1, 2)), (X,), set()),
    "matmul": (lambda x, w: x @ w, (X, (C, 5)), same(0, 1) | {(2, 1, 1)}),
    "matmul of tokens": (
        lambda x, y: x @ y, (X, (B, C, N)), {(0, 0, 0), (0, 1, 0), (1, 0, 1), (2, 1, 2)},
    ),
    "matmul broadcast": (lambda x, y: x @ y, (X, (1, C, N)), {(0, 0, 0), (1, 0, 1), (2, 1, 2)}),
    "permute": (lambda x: x.permute(2, 0, 1), (X,), {(0, 0, 2), (1, 0, 0), (2, 0, 1)}),
    "transpose": (lambda x: x.transpose(-1, 1), (X,), {(0, 0, 0), (1, 0, 2), (2, 0, 1)}),
    "unsqueeze": (lambda x: x.unsqueeze(1), (X,), {(0, 0, 0), (2, 0, 1), (3, 0, 2)}),
    "unsqueeze last": (lambda x: x.unsqueeze(-1), (X,), same(0, 1, 2)),
    "squeeze": (lambda x: x.squeeze(1), ((B, 1, C),), {(0, 0, 0), (1, 0, 2)}),
    "squeeze of a wide axis": (lambda x: x.squeeze(1), (X,), set()),
    "select of channels": (lambda x: x.select(2, 0), (X,), same(0, 1)),
    "select of tokens": (lambda x: x.select(1, 3), (X,), {(0, 0, 0), (1, 0, 2)}),
    "unbind": (lambda x: x.unbind(1)[2], (X,), {(0, 0, 0), (1, 0, 2)}),
    "expand": (lambda x: x.expand(B, N, C), ((1, N, C),), same(1, 2)),
    "expand creates tokens": (lambda x: x.expand(B, N, C), ((B, 1, C),), same(0, 2)),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 1), (X,), same(0, 2)),
    "view splits channels": (lambda x: x.view(B, N, 2, 4), (X,), same(0, 1)),
    "view splits tokens": (lambda x: x.view(B, 2, 3, C), (X,), {(0, 0, 0), (3, 0, 2)}),
    "view merges samples and tokens": (lambda x: x.view(B * N, C), (X,), {(1, 0, 2)}),
    "view merges tokens and channels": (lambda x: x.view(B, N * C), (X,), same(0)),
    "view of equal sizes elsewhere": (lambda x: x.view(N, B, C), (X,), {(2, 0, 2)}),
    "unflatten": (lambda x: x.unflatten(-1, (2, 4)), (X,), same(0, 1)),
    "flatten": (lambda x: x.flatten(0, 1), (X,), {(1, 0, 2)}),
    "stack": (
        lambda x, y: torch.stack([x, y], 1), (X, X),
        {(o, i, a) for i in (0, 1) for a, o in ((0, 0), (1, 2), (2, 3))},
    ),
    "slice with a step": (lambda x: x[:, ::2], (X,), same(0, 2)),
    "slice of everything": (lambda x: torch.ops.aten.slice(x, 1, 0, N), (X,), same(0, 1, 2)),
    "roll": (lambda x: x.roll(1, 1), (X,), same(0, 2)),
    "roll of everything": (lambda x: torch.ops.aten.roll(x, [1]), (X,), set()),
    "flip": (lambda x: x.flip(1), (X,), same(0, 2)),
    "cumsum": (lambda x: x.cumsum(1), (X,), same(0, 2)),
    "repeat": (lambda x: x.repeat(1, 2, 1), (X,), same(0, 2)),
    "repeat with a new axis": (
        lambda x: x.repeat(3, 1, 1, 2), (X,), {(1, 0, 0), (2, 0, 1)},
    ),
    "pad of channels": (lambda x: F.pad(x, (1, 0)), (X,), same(0, 1)),
    "empty_like": (torch.ops.aten.empty_like, (X,), same(0, 1, 2)),
    "slice_scatter of channels": (
        lambda x, y: torch.slice_scatter(x, y, 2, 0, None, 2), (X, (B, N, 4)),
        same(0, 1) | {(0, 1, 0), (1, 1, 1)},
    ),
    "select_scatter": (
        lambda x, y: torch.select_scatter(x, y, 0, 1), (X, (N, C)),
        same(1, 2) | {(1, 1, 0), (2, 1, 1)},
    ),
    "conv1d": (
        lambda x, w: F.conv1d(x, w, padding=1), ((B, C, N), (C, C, 3)), {(0, 0, 0)},
    ),
    "conv1d of one sample": (
        lambda x, w: F.conv1d(x, w, padding=1), ((C, N), (C, C, 3)), set(),
    ),
    "group_norm": (lambda x: F.group_norm(x, 2), ((B, C, N),), {(0, 0, 0)}),
    "average pooling": (lambda x: F.avg_pool1d(x, 2), ((B, C, N),), same(0, 1)),
    "average pooling of one sample": (lambda x: F.avg_pool2d(x, (1, 3)), (X,), set()),
    "pixel shuffle": (lambda x: F.pixel_shuffle(x, 2), ((B, 4, 3, 3),), same(0)),
    "pixel shuffle of one sample": (lambda x: F.pixel_shuffle(x, 2), ((4, 3, 3),), set()),
    "einsum": (
        lambda x, y: torch.einsum("bnc,bmc->bnm", x, y), (X, (B, 5, C)),
        {(0, 0, 0), (0, 1, 0), (1, 0, 1), (2, 1, 1)},
    ),
    "einsum with a sum of tokens": (
        lambda x, y: torch.einsum("bnc,bnd->bcd", x, y), (X, (B, N, 5)),
        {(0, 0, 0), (0, 1, 0), (1, 0, 2), (2, 1, 2)},
    ),
    "index_select": (
        lambda x: x.index_select(1, torch.arange(3)), (X,), same(0, 2),
    ),
    "view_as_complex": (torch.view_as_complex, ((B, N, 2),), same(0, 1)),
    "baddbmm": (
        torch.baddbmm, ((N, 5), X, (B, C, 5)),
        {(0, 1, 0), (0, 2, 0), (1, 1, 1), (2, 2, 2), (1, 0, 0), (2, 0, 1)},
    ),
    "gather": (lambda x: x.gather(1, x.argsort(1)), (X,), set()),
}  # fmt: skip


@pytest.mark.parametrize("name", LINKS)
def test_links(name):
    function, shapes, expected = LINKS[name]
    assert facts(function, *shapes) == (expected, set())


PARTS = {
    "slice": (lambda x: x[:, 2:5], (X,), same(0, 2), {((0, 1), ("out", 1), 2)}),
    "slice from the end": (lambda x: x[:, -2:], (X,), same(0, 2), {((0, 1), ("out", 1), 4)}),
    "slice beyond the start": (
        lambda x: torch.ops.aten.slice(x, 1, -99, 2), (X,), same(0, 2), {((0, 1), ("out", 1), 0)},
    ),
    "slice of channels": (lambda x: x[..., 3:], (X,), same(0, 1), {((0, 2), ("out", 2), 3)}),
    "split": (lambda x: x.split([1, 5], 1)[1], (X,), same(0, 2), {((0, 1), ("out", 1), 1)}),
    "chunk": (lambda x: x.chunk(2, -1)[1], (X,), same(0, 1), {((0, 2), ("out", 2), 4)}),
    "tensor_split": (
        lambda x: x.tensor_split((1, 4), 1)[1], (X,), same(0, 2), {((0, 1), ("out", 1), 1)},
    ),
    "uneven chunk": (lambda x: x.chunk(4, 1)[2], (X,), same(0, 2), {((0, 1), ("out", 1), 4)}),
    "cat of tokens": (
        lambda x, y: torch.cat([x, y], 1), (X, (B, 3, C)),
        {(a, i, a) for a in (0, 2) for i in (0, 1)},
        {(("out", 1), (0, 1), 0), (("out", 1), (1, 1), N)},
    ),
    "cat of channels": (
        lambda x, y: torch.cat([x, y], -1), (X, X),
        {(a, i, a) for a in (0, 1) for i in (0, 1)},
        {(("out", 2), (0, 2), 0), (("out", 2), (1, 2), C)},
    ),
    "cat with an empty list of numbers": (
        lambda x, y: torch.cat([y, x], 1), (X, (0,)), set(), set(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_parts(name):
    function, shapes, links, parts = PARTS[name]
    assert facts(function, *shapes) == (links, parts)


Q, K = (B, 2, N, 4), (B, 2, 9, 4)
ATTENTIONS = {
    "cross": (
        Q, K, {}, {(a, 0, a) for a in (0, 1, 2)} | {(a, i, a) for a in (0, 1) for i in (1, 2)},
    ),
    "grouped": (
        (B, 4, N, 4), K, {"enable_gqa": True},
        {(a, 0, a) for a in (0, 1, 2)} | {(0, 1, 0), (0, 2, 0)},
    ),
    "query broadcast over samples": (
        (1, 2, N, 4), K, {}, {(1, 0, 1), (2, 0, 2)} | {(a, i, a) for a in (0, 1) for i in (1, 2)},
    ),
    "keys of as many tokens as queries": (
        Q, Q, {}, {(a, 0, a) for a in (0, 1, 2)} | {(a, i, a) for a in (0, 1) for i in (1, 2)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name):
    query, key, options, expected = ATTENTIONS[name]

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **options)

    assert facts(attend, query, key, key)[0] == expected


sizes = st.lists(st.integers(1, 6), min_size=1, max_size=5)


@st.composite
def reshapes(draw):
    """Two shapes of equally many elements, sharing axes and mixing others."""
    old, new = [], []
    for _ in range(draw(st.integers(1, 4))):
        a, b = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        forms = st.sampled_from([[a, b], [a * b], [b, a], [a, 1, b], [1, a * b]])
        old += draw(forms)
        new += draw(forms)
    assume(math.prod(old) <= 4096)
    return old, new


@given(reshapes())
def test_aligned_axes_keep_positions(shapes):
    """Brute force: along a pair of axes, every element keeps its position."""
    old, new = shapes
    pairs = list(aligned_axes(old, new))
    for before, after in pairs:
        assert old[before] == new[after]
        shape = [1] * len(old)
        shape[before] = old[before]
        positions = torch.arange(old[before]).view(shape).expand(old).reshape(new)
        shape = [1] * len(new)
        shape[after] = new[after]
        assert torch.equal(positions, torch.arange(new[after]).view(shape).expand(new))
    for left, right in pairwise(pairs):
        assert left[0] < right[0]
        assert left[1] < right[1]


@given(sizes)
def test_a_reshape_to_the_same_shape_keeps_every_axis(shape):
    assert list(aligned_axes(shape, shape)) == [(i, i) for i in range(len(shape))]


def test_operands_are_told_from_other_arguments():
    module = make_fx(lambda x: torch.cat([x.view(4), x.view(4)]), pre_dispatch=True)(
        torch.ones(2, 2)
    )
    view = next(n for n in module.graph.nodes if "view" in n.name)
    cat = next(n for n in module.graph.nodes if "cat" in n.name)
    assert operand_at(view, 0).op == "placeholder"
    assert len(operands_at(cat, 0)) == 2
    with pytest.raises(PassError, match="argument 1 is no tensor"):
        operand_at(view, 1)
    with pytest.raises(PassError, match="argument 0 is no list"):
        operands_at(view, 0)
