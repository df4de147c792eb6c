"""Fuse: attention written out by hand becomes one op with the same value; near misses stay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from specdiff.passes.base import check_values
from specdiff.passes.normalize.fuse_attention import fuse_attention
from specdiff.passes.normalize.rewrite import collapse_views
from specdiff.passes.rules.attention import ATTENTION, Attention
from specdiff.passes.rules.shape import VIEWS
from tests.models import changed, randomize
from tests.oracles import trace
from tests.passes.checks import check_oracles
from tests.passes.normalize.test_normalize import count, graph_of
from tests.passes.toys import CHANNELS, HEADS, TEXT, TOKENS, Toy, toy_inputs

aten = torch.ops.aten
N = TEXT + TOKENS
SCALE = 0.3
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default)


def _merged(x):
    """[B, H, N, D] to [B * H, N, D], as old attention processors of diffusers do."""
    return x.reshape(-1, *x.shape[2:])


def _split(x):
    return x.reshape(-1, HEADS, *x.shape[1:])


def _bias(q):
    """A mask that tells queries from each other, float32 or what `q` is."""
    table = torch.arange(N * N, device=q.device).view(N, N)
    return (table * 7 % 11 / 5 - 1).to(q.dtype)


def _matmul(q, k, v):
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def _matmul_of_transposed_keys(q, k, v):
    keys = k.permute(0, 1, 3, 2) * SCALE
    return torch.matmul(torch.matmul(q, keys).softmax(3), v)


def _keys_made_transposed(q, k, v):
    keys = k.permute(0, 3, 1, 2).contiguous().permute(0, 2, 1, 3)
    return (q @ keys).softmax(-1) @ v


def _scaled_before(q, k, v):
    return ((q * SCALE) @ (k / 2).mT).softmax(-1) @ v


def _scaled_after(q, k, v):
    return ((q @ k.mT) / 3 * SCALE).softmax(-1) @ v


def _mask(q, k, v):
    return (q @ k.mT * SCALE + _bias(q)).softmax(-1) @ v


def _mask_on_the_left(q, k, v):
    return (_bias(q)[None, None] + q @ k.mT * SCALE).softmax(-1) @ v


def _upcast(q, k, v):
    return (q @ k.mT * SCALE).double().softmax(-1).to(v.dtype) @ v


def _softmax_dtype(q, k, v):
    return F.softmax(q @ k.mT, dim=-1, dtype=torch.float64).to(v.dtype) @ v


def _upcast_operands(q, k, v):
    scores = (q.double() * SCALE) @ k.double().transpose(2, 3)
    return scores.softmax(-1).to(v.dtype) @ v


def _dropout_in_eval(q, k, v):
    return F.dropout((q @ k.mT).softmax(-1), 0.1, False) @ v


def _bmm(q, k, v):
    q, k, v = (_merged(x) for x in (q, k, v))
    return _split(torch.bmm((torch.bmm(q, k.mT) * SCALE).softmax(-1), v))


def _bmm_of_scaled_heads(q, k, v):
    q, k, v = (_merged(x) for x in (q, k, v))
    return _split(torch.bmm(torch.bmm(q * SCALE, (k * SCALE).mT).softmax(-1), v))


def _bmm_of_transposed_heads(q, k, v):
    q, k, v = _merged(q), k.permute(0, 1, 3, 2).reshape(-1, k.shape[-1], k.shape[-2]), _merged(v)
    return _split(torch.bmm((torch.bmm(q, k) * SCALE).softmax(-1), v))


def _baddbmm(q, k, v):
    q, k, v = (_merged(x) for x in (q, k, v))
    scores = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
    scores = torch.baddbmm(scores, q, k.transpose(-1, -2), beta=0, alpha=SCALE)
    return _split(torch.bmm(scores.softmax(dim=-1), v))


def _baddbmm_repeated_mask(q, k, v):
    """One mask for all heads, another for each sample."""
    samples = torch.arange(q.shape[0], device=q.device)[:, None, None]
    mask = (_bias(q) * (1 + samples)).repeat_interleave(HEADS, dim=0)
    q, k, v = (_merged(x) for x in (q, k, v))
    return _split(torch.bmm(torch.baddbmm(mask, q, k.mT, alpha=SCALE).softmax(-1), v))


def _baddbmm_mask_per_head(q, k, v):
    rows = torch.arange(q.shape[0] * HEADS, device=q.device)[:, None, None]
    mask = _bias(q) * (1 + rows)
    q, k, v = (_merged(x) for x in (q, k, v))
    return _split(torch.bmm(torch.baddbmm(mask, q, k.mT, alpha=SCALE).softmax(-1), v))


def _baddbmm_key_mask(q, k, v):
    """A padding mask, the same for all queries and samples."""
    mask = (torch.arange(N, device=q.device) < 1).to(q.dtype)[None, None] * -1e4
    q, k, v = (_merged(x) for x in (q, k, v))
    return _split(torch.bmm(torch.baddbmm(mask, q, k.mT).softmax(-1), v))


FORMS = [
    _matmul,
    _matmul_of_transposed_keys,
    _keys_made_transposed,
    _scaled_before,
    _scaled_after,
    _mask,
    _mask_on_the_left,
    _upcast,
    _softmax_dtype,
    _upcast_operands,
    _dropout_in_eval,
    _bmm,
    _bmm_of_scaled_heads,
    _bmm_of_transposed_heads,
    _baddbmm,
    _baddbmm_repeated_mask,
    _baddbmm_mask_per_head,
    _baddbmm_key_mask,
]


def _softmax_over_queries(q, k, v):
    return (q @ k.mT).softmax(-2) @ v


def _scores_used_twice(q, k, v):
    scores = q @ k.mT
    return scores.softmax(-1) @ v + scores.mean(-1, keepdim=True)


def _weights_used_twice(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v + weights.amax(-1, keepdim=True)


def _broadcast_batch(q, k, v):
    return (q @ k[:1].mT).softmax(-1) @ v


def _broadcast_scores(q, k, v):
    return (q[:, :1] @ k[:, :1].mT + _bias(q) * v[:, :, :1, :1]).softmax(-1) @ v


def _not_contracted_over_keys(q, k, v):
    return (v.mT @ (q @ k.mT).softmax(-1)).mT


def _mask_scaled_too(q, k, v):
    return ((q @ k.mT + _bias(q)) * SCALE).softmax(-1) @ v


def _two_masks(q, k, v):
    return (q @ k.mT + _bias(q) + _bias(q).mT).softmax(-1) @ v


def _scaled_mask(q, k, v):
    return torch.add(q @ k.mT, _bias(q), alpha=2).softmax(-1) @ v


def _scaled_input(q, k, v):
    q, k, v = (_merged(x) for x in (q, k, v))
    mask = _bias(q).expand(q.shape[0], -1, -1)
    return _split(torch.bmm(torch.baddbmm(mask, q, k.mT, beta=2).softmax(-1), v))


def _mask_of_columns(q, k, v):
    return (q @ k.mT + _bias(q)[:, :1]).softmax(-1) @ v


def _negative_scale(q, k, v):
    return (q @ k.mT * -SCALE).softmax(-1) @ v


def _overwritten_scores(q, k, v):
    return (q @ k.mT).masked_fill(_bias(q) > 1, float("-inf")).softmax(-1) @ v


def _more_precise_values(q, k, v):
    return ((q @ k.mT).softmax(-1).double() @ v.double()).to(v.dtype)


def _less_precise_weights(q, k, v):
    return (q @ k.mT).bfloat16().softmax(-1).to(v.dtype) @ v


def _sum_with_itself(q, k, v):
    scores = q @ k.mT
    return (scores + scores).softmax(-1) @ v


def _weights_of_weights(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ weights


NEAR_MISSES = [
    _softmax_over_queries,
    _scores_used_twice,
    _weights_used_twice,
    _broadcast_batch,
    _broadcast_scores,
    _not_contracted_over_keys,
    _mask_scaled_too,
    _two_masks,
    _scaled_mask,
    _scaled_input,
    _mask_of_columns,
    _negative_scale,
    _overwritten_scores,
    _more_precise_values,
    _less_precise_weights,
    _sum_with_itself,
    _weights_of_weights,
]


def operands(heads=HEADS):
    """Query, key and value as models have them: stored as [B, N, H, D]."""
    torch.manual_seed(0)
    return [torch.randn(2, N, heads, 4).transpose(1, 2) for _ in range(3)]


def fused(function, *inputs):
    """The graph of `function` after the rewriting, checked."""
    module = graph_of(function, *inputs)
    fuse_attention(module.graph)
    check_values(module.graph)
    module.recompile()
    check_fresh(module)
    return module


def check_fresh(module):
    """Every value says what its node computes, strides included."""
    for node in module.graph.find_nodes(op="placeholder"):
        mode = node.meta["val"].fake_mode
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with mode:
            value, known = node.target(*args, **kwargs), node.meta["val"]
        assert (value.shape, value.dtype) == (known.shape, known.dtype), node
        assert value.stride() == known.stride(), node


def handwritten(form):
    """A toy that writes its attentions like `form`."""

    class Handwritten(Toy):
        def attention(self, x):
            y = self.norm(x)
            out = form(*(self.heads(linear(y)) for linear in (self.q, self.k, self.v)))
            return x + self.o(out.transpose(1, 2).reshape(x.shape))

    torch.manual_seed(0)
    return randomize(Handwritten(lambda t, x: x)).eval()


@pytest.mark.parametrize("form", FORMS)
def test_written_attention_becomes_one_op(form):
    inputs = operands()
    module = fused(form, *inputs)
    assert count(module, ATTENTION) == 1
    assert not any(count(module, target) for target in (*PRODUCTS, aten.softmax.int))
    torch.testing.assert_close(module(*inputs), form(*inputs))


@pytest.mark.parametrize("form", [f for f in FORMS if "bmm" in f.__name__])
def test_merged_heads_become_an_axis_again(form):
    (node,) = fused(form, *operands()).graph.find_nodes(op="call_function", target=ATTENTION)
    found = Attention.of(node)
    assert {len(o.meta["val"].shape) for o in (node, found.query, found.key, found.value)} == {4}


@pytest.mark.parametrize("form", FORMS)
def test_the_tokens_of_written_attention_are_prunable(form):
    model, inputs = handwritten(form), toy_inputs()
    later = changed(inputs)
    found = trace(model, inputs, later)
    selection = found.analysis.selection
    assert selection.tokens == TOKENS
    attentions = [n for n in selection.axes.graph.nodes if n.target is ATTENTION]
    assert len(attentions) == 2
    # queries are rows: no attention is a mixing op, and nothing but keys and values is kept
    assert all(selection.is_token_wise(node) for node in attentions)
    read = {o for n in attentions for o in (Attention.of(n).key, Attention.of(n).value)}
    assert set(selection.cached) <= read
    check_oracles(model, (inputs, later), found)


@pytest.mark.parametrize("form", NEAR_MISSES)
def test_near_misses_stay(form):
    inputs = operands()
    module = graph_of(form, *inputs)
    fuse_attention(module.graph)
    module.recompile()
    assert count(module, ATTENTION) == 0
    torch.testing.assert_close(module(*inputs), form(*inputs), equal_nan=True)


def test_dropout_in_training_stays():
    module = graph_of(lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.1) @ v, *operands())
    fuse_attention(module.graph)
    assert count(module, ATTENTION) == 0


def test_half_precision_with_float_softmax():
    """As most models write it; the op rounds later than what is written, never earlier."""
    inputs = [x.bfloat16() for x in operands()]

    def form(q, k, v):
        return (q.float() @ k.float().transpose(-1, -2) * SCALE).softmax(-1).to(v.dtype) @ v

    module = fused(form, *inputs)
    assert count(module, ATTENTION) == 1
    exact = form(*(x.double() for x in inputs))
    error, written = ((f(*inputs) - exact).abs().max() for f in (module, form))
    assert error <= 1.5 * written


def test_one_head_and_one_sample():
    for inputs in (operands(heads=1), [x[:1] for x in operands()]):

        def form(q, k, v):
            shape = q.shape
            q, k, v = (_merged(x) for x in (q, k, v))
            return torch.bmm(torch.bmm(q, k.mT).softmax(-1), v).reshape(shape)

        module = fused(form, *inputs)
        (node,) = module.graph.find_nodes(op="call_function", target=ATTENTION)
        assert node.meta["val"].shape == inputs[0].shape
        torch.testing.assert_close(module(*inputs), form(*inputs))


def test_tokens_without_heads():
    x = torch.randn(2, N, CHANNELS)
    module = fused(_matmul, x, x + 1, x + 2)
    assert count(module, ATTENTION) == 1
    torch.testing.assert_close(module(x, x + 1, x + 2), _matmul(x, x + 1, x + 2))


def test_provenance_is_that_of_the_output():
    module = graph_of(_baddbmm, *operands())
    (product,) = module.graph.find_nodes(op="call_function", target=aten.bmm.default)
    product.meta["stack_trace"] = "here"
    fuse_attention(module.graph)
    (node,) = module.graph.find_nodes(op="call_function", target=ATTENTION)
    assert node.meta["stack_trace"] == "here"


def test_views_of_views_are_one():
    def function(x):
        merged = x.view(-1, 4)
        return merged.view(2, 3, 4) * 2, merged.view(3, 2, 4), merged.sum(0)

    x = torch.randn(2, 3, 4)
    module = graph_of(function, x)
    collapse_views(module.graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    # back to x; one view; and the inner one for the user that keeps it
    assert sum(count(module, target) for target in VIEWS) == 2
    (doubled,) = module.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    assert doubled.args[0].op == "placeholder"
    for got, expected in zip(module(x), function(x), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_view_that_asks_for_storage_keeps_its_operand():
    def function(x):
        copied = x.transpose(1, 2).reshape(2, -1)
        return torch.view_as_complex(copied.reshape(2, 3, 2, 2))

    x = torch.randn(2, 4, 3)
    module = fused(function, x)
    torch.testing.assert_close(module(x), function(x))
