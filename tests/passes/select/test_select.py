"""Toys with awkward middles stay correct by the oracles; what has no selective form is refused."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from specdiff.errors import Unsupported
from specdiff.passes.rules.attention import ATTENTION
from tests.models import changed, randomize
from tests.oracles import analyse_graph, trace
from tests.passes.checks import check_oracles, importance_of
from tests.passes.toys import BATCH, CHANNELS, TEXT, TOKENS, Toy, attend, toy, toy_inputs

N = TOKENS


def _conv(t, x):
    return x + t.conv(x.transpose(1, 2)).transpose(1, 2)


def _grid_conv(t, x):
    """Tokens become an image and back: a view that splits them, of a value out of a cache."""
    image = t.norm(x).transpose(1, 2).contiguous().view(x.shape[0], CHANNELS, 2, 5)
    weight = t.conv.weight.unsqueeze(2)
    return x + F.conv2d(image, weight, padding=(0, 1)).flatten(2).transpose(1, 2)


def _shift(t, x):
    return x + torch.cat([x[:, :1], x[:, :-1]], 1)


def _windows(t, x):
    windows = attend(x.reshape(-1, N // 2, CHANNELS))
    return x + windows.reshape(x.shape)


def _linear_attention(t, x):
    q, k, v = t.q(x).softmax(-1), t.k(x).softmax(1), t.v(x)
    return x + q @ (k.mT @ v)


def _explicit_attention(t, x):
    return x + (t.q(x) @ t.k(x).mT / 3).softmax(-1) @ t.v(x)


def _attention_of_each_token(t, x):
    """Each token attends over its heads: the tokens are a batch axis, of keys and values too."""
    y = t.q(x).unflatten(-1, (2, 2, 2))
    return x + F.scaled_dot_product_attention(y, y, y).flatten(2)


def _samples_behind_heads(t, x):
    """A causal attention whose samples are not the first axis."""
    y = x.unflatten(-1, (2, -1)).permute(2, 0, 1, 3)
    out = F.scaled_dot_product_attention(y, y, y, is_causal=True)
    return x + out.permute(1, 2, 0, 3).flatten(2)


def _pairs_of_mixed_values(t, x):
    """Neighbouring tokens as complex numbers, of a value out of a cache."""
    pairs = torch.view_as_complex(t.q(x).mT.unflatten(-1, (-1, 2)).contiguous())
    return x + t.k(torch.view_as_real(pairs * 1j).flatten(2).mT)


def _written_behind(t, x):
    y = x.clone()
    y[:, 4:] = t.q(x[:, 4:])
    return x + y


def _written_shifted(t, x):
    y = torch.zeros_like(x)
    y[:, 4:] = t.q(x)[:, :-4]
    return x + y


def _written_into_nothing(t, x):
    y = torch.empty_like(x)
    y[:, :4] = t.q(x)[:, :4]
    y[:, 4:] = t.k(x)[:, :-4]
    return y


def _written_at_a_step(t, x):
    y = t.q(x)
    y[:, 1::2] = x[:, ::2]
    return x + y


def _channel_chunks(t, x):
    gate, value = t.wide(x).chunk(2, -1)
    return x + gate.sigmoid() * value


def _channel_cat(t, x):
    return x + torch.cat([t.q(x)[..., :3], t.k(x)[..., 3:]], -1)


def _unflatten_tokens(t, x):
    return x + t.q(x).unflatten(1, (N, 1)).mul(2).flatten(1, 2)


def _batch_halves(t, x):
    return x + torch.cat([t.q(x[:1]), t.k(x[1:])], 0)


def _own_mask(t, x):
    """A mask that is computed from the tokens themselves."""
    scores = t.q(x).mean(-1)
    return x + attend(x, attn_mask=(scores[:, :, None] - scores[:, None, :])[:, None])


def _constant(t, x):
    return x * torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0, 3.0, 1.0, 1.0])


def _token_constant(t, x):
    return x * torch.arange(N, device=x.device)[:, None].cos()


def _signed_zeros(t, x):
    """Quotients by constants that are equal, but not to a quotient."""
    quotients = [1 / torch.full_like(x, zero) for zero in (0.0, -0.0)]
    return x + quotients[0].clamp(-1, 1) + 0.5 * quotients[1].clamp(-1, 1)


def _scattered_in_half(t, x):
    return x + torch.slice_scatter(x.half(), 2 * t.q(x)[..., :4], 2, 0, 4).float()


MIDDLES = {
    "nothing": lambda t, x: x,
    "position table": lambda t, x: x + t.table,
    "conv1d": _conv,
    "grid conv": _grid_conv,
    "roll": lambda t, x: x + x.roll(1, 1),
    "flip": lambda t, x: x + x.flip(1),
    "cumsum": lambda t, x: x + 0.1 * x.cumsum(1),
    "linear attention": _linear_attention,
    "explicit attention": _explicit_attention,
    "channel chunks": _channel_chunks,
    "channel cat": _channel_cat,
    "unflatten of the tokens": _unflatten_tokens,
    "batch halves": _batch_halves,
    "query is key is value": lambda t, x: x + attend(x),
    "softmax over tokens": lambda t, x: x + x.softmax(1),
    "norm over tokens": lambda t, x: x + F.layer_norm(x.mT, (N,)).mT,
    "mean over tokens": lambda t, x: x + x.mean(1, keepdim=True),
    "max over channels": lambda t, x: x + x.amax(-1, keepdim=True),
    "gather": lambda t, x: x + x.gather(1, x.argsort(1)),
    "constant": _constant,
    "token constant": _token_constant,
    "own mask": _own_mask,
    "token shift": _shift,
    "windows": _windows,
    "attention of each token": _attention_of_each_token,
    "samples behind heads": _samples_behind_heads,
    "complex pairs of mixed values": _pairs_of_mixed_values,
    "written behind": _written_behind,
    "written shifted": _written_shifted,
    "written into nothing": _written_into_nothing,
    "written at a step": _written_at_a_step,
    "sum with itself": lambda t, x: x + torch.einsum("bnc,bmc->bnc", x, x) / N,
    "outer sum with itself": lambda t, x: x + torch.einsum("bnc,bmd->bnd", x, x) / N,
    "product with itself": lambda t, x: x + (w := t.q(x) @ t.k(x).mT / N) @ w @ x,
    "pool that takes samples for channels": lambda t, x: (
        x + F.avg_pool2d(x, (3, 1), stride=1, padding=(1, 0))
    ),
    "signed zeros": _signed_zeros,
    "scattered in half": _scattered_in_half,
    "idle squeeze": lambda t, x: x + t.q(x).squeeze(1),
    "even rows": lambda t, x: x + F.interpolate(x[:, ::2].mT, N).mT,
}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# with one sample an axis of samples looks like any other axis of size one
SINGLE = (
    "attention of each token",
    "position table",
    "grid conv",
    "channel chunks",
    "unflatten of the tokens",
    "own mask",
)


@pytest.mark.parametrize(
    ("middle", "batch"), [*((m, BATCH) for m in MIDDLES), *((m, 1) for m in SINGLE)]
)
def test_toys_by_the_oracles(middle, batch):
    model, inputs = toy(MIDDLES[middle], batch=batch)
    found = trace(model, inputs, changed(inputs))
    check_oracles(model, (inputs, changed(inputs)), found)


class TwoOutputs(nn.Module):
    """Image and sound, the image in a dtype of its own."""

    def __init__(self, dtype):
        super().__init__()
        self.toy, self.dtype = Toy(lambda t, x: x, text=False), dtype

    def forward(self, hidden_states, sound, timestep):
        x = self.toy.embed(torch.cat([hidden_states, sound], 1)) + timestep[:, None, None]
        x = self.toy.head(self.toy.attention(x))
        return x[:, :N].to(self.dtype), x[:, N:]


def test_outputs_of_different_dtypes_are_not_put_into_one():
    inputs = {**masked_call(), "sound": torch.randn(BATCH, 6, 4)}
    trace(randomize(TwoOutputs(torch.float32)), inputs)
    assert "different dtypes" in _reason(randomize(TwoOutputs(torch.bfloat16)), inputs)


def _mask(kind: str, size: int) -> torch.Tensor:
    torch.manual_seed(5)
    shapes = {
        "[L, S]": (size, size),
        "[B, 1, L, S]": (BATCH, 1, size, size),
        "[1, H, L, S]": (1, 2, size, size),
        "[B, 1, 1, S]": (BATCH, 1, 1, size),
        "[1, S]": (1, size),
    }
    return torch.randn(shapes[kind])


class Masked(nn.Module):
    """A toy whose attentions get options, and an input to make a mask of."""

    def __init__(self, **options):
        super().__init__()
        self.toy = Toy(lambda t, x: x)
        self.options = options

    def forward(self, hidden_states, timestep, mask=None):
        options = dict(self.options)
        if mask is not None:
            options["attn_mask"] = mask
        x = self.toy.embed(hidden_states) + timestep.sin()[:, None, None]
        x = self.toy.attention(self.toy.attention(x, **options), **options)
        return (self.toy.head(x),)


def masked_call(mask=None, batch=BATCH):
    inputs = {k: v for k, v in toy_inputs(batch).items() if k != "encoder_hidden_states"}
    return inputs if mask is None else {**inputs, "mask": mask}


@pytest.mark.parametrize("boolean", [False, True], ids=["float", "bool"])
@pytest.mark.parametrize(
    "kind", ["[L, S]", "[B, 1, L, S]", "[1, H, L, S]", "[B, 1, 1, S]", "[1, S]"]
)
def test_masks_follow_the_query_rows(kind, boolean):
    mask = _mask(kind, N)
    mask = mask > -0.5 if boolean else mask
    model, inputs = randomize(Masked()), masked_call(mask)
    found = trace(model, inputs, changed(inputs))
    check_oracles(model, (inputs, changed(inputs)), found)
    # the mask matters: without it the model says something else
    assert not torch.allclose(model(**inputs)[0], model(**masked_call())[0])


@pytest.mark.parametrize("batch", [1, BATCH])
def test_a_causal_attention_counts_positions_of_tokens_not_of_rows(batch):
    model, inputs = randomize(Masked(is_causal=True)), masked_call(batch=batch)
    found = trace(model, inputs, changed(inputs))
    check_oracles(model, (inputs, changed(inputs)), found)
    attention = next(n for n in found.analysis.module.graph.nodes if n.target is ATTENTION)
    assert found.analysis.selection.is_token_wise(attention)


def test_queries_that_may_attend_to_nothing_have_no_importance():
    """Padding masks leave whole rows without a key; their share is nothing, not nan."""
    valid = torch.arange(N)[None] < torch.tensor([[N], [N - 3]])
    mask = (valid[:, :, None] & valid[:, None, :])[:, None]
    model, inputs = randomize(Masked()), masked_call(mask)
    found = trace(model, inputs, changed(inputs))
    importance = importance_of(found)
    assert importance.isfinite().all()
    assert (importance[1, -3:] == 0).all()
    assert (importance[0] > 0).all()


class Grouped(Masked):
    """Four query heads, two of keys and values."""

    def forward(self, hidden_states, timestep):
        t = self.toy
        x = t.embed(hidden_states) + timestep.sin()[:, None, None]
        query = t.q(x).unflatten(-1, (4, 2)).transpose(1, 2)
        key, value = (f(x)[..., :4].unflatten(-1, (2, 2)).transpose(1, 2) for f in (t.k, t.v))
        out = F.scaled_dot_product_attention(query, key, value, enable_gqa=True, scale=0.4)
        return (t.head(x + out.transpose(1, 2).flatten(2)),)


def test_grouped_queries():
    model, inputs = randomize(Grouped()), masked_call()
    found = trace(model, inputs, changed(inputs))
    check_oracles(model, (inputs, changed(inputs)), found)
    # the key heads are fewer, so they are not the query's
    assert found.analysis.signature.caches[0].shape == (BATCH, N, 2, 2)


def test_importance_of_grouped_queries_is_that_of_repeated_keys():
    model, inputs = randomize(Grouped()), masked_call()
    found = trace(model, inputs, changed(inputs))
    t = model.toy
    x = t.embed(inputs["hidden_states"]) + inputs["timestep"].sin()[:, None, None]
    query = t.q(x).unflatten(-1, (4, 2)).transpose(1, 2)
    key = t.k(x)[..., :4].unflatten(-1, (2, 2)).transpose(1, 2)[:, [0, 0, 1, 1]]
    expected = (query @ key.mT * 0.4).softmax(-1).mean(2).sum(1)
    importance = importance_of(found)
    torch.testing.assert_close(importance, expected.detach())


def _reason(model, inputs, **compile_options) -> str:
    """Why `model` is refused."""
    reasons = []

    def backend(module, values):
        with pytest.raises(Unsupported) as caught:
            analyse_graph(module, values)
        reasons.append(str(caught.value))
        return module.forward

    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True, **compile_options)(**inputs)
    return reasons[0]


def _write_to_input(t, x):
    x.add_(1)
    return x


REFUSED = {
    "random": (lambda t, x: x + torch.rand_like(x), "draws random numbers"),
    "dropout in training": (lambda t, x: F.dropout(x, 0.5, True), "draws random numbers"),
    "attention dropout": (lambda t, x: attend(x, dropout_p=0.5), "draws random numbers"),
    "strides": (
        lambda t, x: x + x.contiguous().as_strided(x.shape, (80, 8, 1)),
        "reads memory by strides",
    ),
}


@pytest.mark.parametrize("middle", REFUSED)
def test_toys_that_are_refused(middle):
    build, reason = REFUSED[middle]
    assert re.search(reason, _reason(*toy(build)))


def test_dropout_that_drops_nothing_is_no_reason():
    model, inputs = toy(lambda t, x: F.dropout(F.dropout(x, 0.0, True), 0.5, False))
    trace(model, inputs)


class Changed(nn.Module):
    """A toy whose output is passed through `end`."""

    def __init__(self, end, text=True, start=None):
        super().__init__()
        self.toy = Toy(lambda t, x: x, text)
        self.start, self.end = start, end

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        if self.start is not None:
            hidden_states = self.start(hidden_states)
        return self.end(self.toy(hidden_states, encoder_hidden_states, timestep)[0])


class NoAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 4)

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        return (self.embed(hidden_states) + timestep[:, None, None],)


class Joint(Changed):
    """Returns text and image tokens in one tensor."""

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        t = self.toy
        x = t.embed(hidden_states) + timestep.sin()[:, None, None]
        joint = t.attention(torch.cat([t.embed_text(encoder_hidden_states), x], 1))
        return (t.head(joint),)


class Two(Changed):
    """Returns what two attentions say of the same tokens."""

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        t = self.toy
        x = t.embed(hidden_states) + timestep.sin()[:, None, None]
        return t.head(t.attention(x)), t.head(t.attention(x.sin()))


class Both(Changed):
    """Returns text and image tokens apart."""

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        t = self.toy
        x = t.embed(hidden_states) + timestep.sin()[:, None, None]
        joint = t.attention(torch.cat([t.embed_text(encoder_hidden_states), x], 1))
        return t.head(joint[:, TEXT:]), t.head(joint[:, :TEXT])


class Wider(Both):
    """Returns text and image tokens apart, with other channels."""

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        image, text = super().forward(hidden_states, encoder_hidden_states, timestep)
        return image, text.repeat_interleave(2, -1).unflatten(-1, (2, -1))


@pytest.mark.parametrize("build", [Both, Wider])
def test_two_segments_that_reach_the_output_are_both_prunable(build):
    model, inputs = randomize(build(None)), toy_inputs()
    found = trace(model, inputs, changed(inputs))
    check_oracles(model, (inputs, changed(inputs)), found)
    assert sorted(found.analysis.signature.lengths) == sorted([N, TEXT])


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (NoAttention, "no attention"),
        (lambda: Changed(lambda y: (y.mean(1),)), "no input has the shape of an output"),
        (lambda: Changed(lambda y: (y,), start=lambda x: x.add_(1)), "writes to one of its inputs"),
        (lambda: Joint(None), "several segments|no input has the shape"),
        (lambda: Two(None), "several token-level values: linear_10, linear_5$"),
    ],
    ids=[
        "no attention",
        "mean pooling",
        "write to input",
        "joint output",
        "two attentions",
    ],
)
def test_models_that_are_refused(build, reason):
    assert re.search(reason, _reason(randomize(build()), toy_inputs()))


class Positions(Toy):
    """Returns the table of its positions, too, as a model does that keeps it on itself."""

    def __init__(self):
        super().__init__(lambda self, x: x * self.positions)

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        batch = encoder_hidden_states.new_zeros(len(encoder_hidden_states), 1, 1)
        self.positions = (torch.arange(TOKENS)[None, :, None] / 7 + batch).cos()
        (y,) = super().forward(hidden_states, encoder_hidden_states, timestep)
        return y, self.positions


def test_an_output_that_no_attention_feeds_is_computed_whole():
    model, inputs = randomize(Positions()), toy_inputs()
    found = trace(model, inputs, changed(inputs))
    check_oracles(model, (inputs, changed(inputs)), found)
    assert len(found.analysis.selection.slots) == 1


ENDS = {
    "several outputs": lambda y: (y, y * 2, None),
    "two heads": lambda y: (y.sin(), y.exp().cos()),
    "a square output beside": lambda y: (y, y.sin().cumsum(1) @ y.mT.cos()),
    "a pooled output beside": lambda y: (y, y.mean(1)),
    "tail that mixes tokens": lambda y: (y.cumsum(1),),
    "tail that transposes": lambda y: (y.mT.contiguous().mT,),
}


@pytest.mark.parametrize("end", ENDS)
def test_ends(end):
    model, inputs = randomize(Changed(ENDS[end])), toy_inputs()
    found = trace(model, inputs, changed(inputs))
    check_oracles(model, (inputs, changed(inputs)), found)


def test_half_precision():
    model, inputs = toy(_conv)
    model = model.bfloat16()
    inputs = {k: v.bfloat16() for k, v in inputs.items()}
    found = trace(model, inputs, changed(inputs))
    check_oracles(model, (inputs, changed(inputs)), found, rtol=3e-2, atol=3e-2)
    assert {slot.dtype for slot in found.analysis.signature.caches} == {torch.bfloat16}
    assert importance_of(found).dtype is torch.float32


def test_inputs_that_are_not_contiguous():
    model, inputs = toy(_conv)
    inputs["hidden_states"] = inputs["hidden_states"].mT.contiguous().mT
    later = changed(inputs)
    assert not later["hidden_states"].is_contiguous()
    found = trace(model, inputs, later)
    check_oracles(model, (inputs, later), found)


def test_one_tensor_in_two_roles():
    """The image tokens are the text tokens too: they are pruned in both places."""

    class Twice(Changed):
        def forward(self, hidden_states, timestep):
            t = self.toy
            x = t.embed(hidden_states) + timestep.sin()[:, None, None]
            joint = t.attention(torch.cat([t.wide(x)[..., :CHANNELS], x], 1))
            joint = t.attention(joint)
            return (t.head(joint[:, N:]),)

    model, inputs = randomize(Twice(None)), masked_call()
    found = trace(model, inputs, changed(inputs))
    check_oracles(model, (inputs, changed(inputs)), found)
    assert [s.length for s in found.analysis.signature.segments] == [N]


def test_an_input_given_twice():
    model, inputs = toy(lambda t, x: x)
    model.embed_text = nn.Linear(4, CHANNELS)
    inputs["hidden_states"] = inputs["hidden_states"][:, :TEXT].contiguous()
    model.table = None
    inputs["encoder_hidden_states"] = inputs["hidden_states"]
    later = changed(inputs)
    later["encoder_hidden_states"] = later["hidden_states"]
    found = trace(model, inputs, later)
    check_oracles(model, (inputs, later), found)


def test_a_dict_like_output():
    class Output(Changed):
        def forward(self, **inputs):
            return {"sample": super().forward(**inputs)[0]}

    model, inputs = randomize(Output(lambda y: (y,))), toy_inputs()
    found = trace(model, inputs, changed(inputs))
    programs, flat = found.programs(), found.flat[0]
    sample = programs.tail(flat, programs.probe(flat))[0]
    torch.testing.assert_close(sample, model(**inputs)["sample"])


def test_a_written_slice_of_tokens_stays_token_wise():
    model, inputs = toy(_written_behind)
    selection = trace(model, inputs).analysis.selection
    late = [
        n for n in selection.whole if n in selection.attention_dependent and selection.carries(n)
    ]
    assert set(late) <= set(selection.cached)
    assert not [n for n in selection.axes.graph.nodes if "scatter" in str(n.target)]
