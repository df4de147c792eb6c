"""Keys and values in caches as 8-bit codes: the oracles, what stays as it is, what is allocated."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdiff import pipeline
from specdiff.options import KV_CACHE_DTYPES, Options
from specdiff.oracles.checks import all_active, coded, idempotence, random_active
from specdiff.passes.emit.rows import emit_selective
from specdiff.passes.emit.whole import emit_dense
from specdiff.passes.graph.writer import GraphWriter
from specdiff.passes.select.cache_layout import decode, encode, largest_code
from specdiff.passes.select.cost import CostModel, Sizes
from specdiff.passes.select.quantize import QuantizePass, quantized, uncoded
from tests.models import ZOO, Inputs, changed, flux, randomize, sd3
from tests.oracles import Traced, trace
from tests.passes.checks import masked_dense, without_text
from tests.passes.toys import Toy, toy_inputs

aten = torch.ops.aten
CODES = list(KV_CACHE_DTYPES.values())
EXACT = {"rtol": 1e-12, "atol": 1e-12}
MODELS = {
    "flux": flux,
    "sd3, guided": sd3,
    "sd3.5": lambda: sd3(qk_norm="rms_norm", dual=(0,)),
    "one stream": lambda: flux(layers=0, single_layers=2, batch=1),
    "aura flow": lambda: of_zoo("aura_flow_transformer"),
    "cross-attention": lambda: of_zoo("pixart_transformer"),
    "convolutions": lambda: of_zoo("sana_transformer"),
}


def of_zoo(name: str) -> tuple[nn.Module, Inputs]:
    case = ZOO[name]()
    return case.model, case.inputs


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=MODELS)
def found(request) -> Traced:
    with torch.no_grad():
        return trace(*MODELS[request.param]())


@pytest.fixture(scope="module", params=["flux", "sd3.5"])
def precise(request) -> tuple[nn.Module, Inputs, Traced]:
    """In float64 no sum in another order moves a value over the border between two codes."""
    model, inputs = MODELS[request.param]()
    inputs = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    with torch.no_grad():
        return model.double(), inputs, trace(model, inputs, changed(inputs))


# Bytes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [None, *CODES])
def test_formula_is_signature_is_what_is_allocated(found, code):
    selection, signature = (
        found.coded(code).analysis.selection,
        found.coded(code).analysis.signature,
    )
    cost = CostModel(selection)
    formula = cost.caches((*selection.cached, *selection.known))
    assert cost.sizes.evaluate(formula) == signature.cache_bytes
    allocated = [slot.allocate() for slot in signature.caches]
    assert sum(cache.untyped_storage().nbytes() for cache in allocated) == signature.cache_bytes


@pytest.mark.parametrize("code", [None, *CODES])
@pytest.mark.parametrize(
    ("build", "other"),
    [
        (flux, {"rows": 3, "columns": 5, "text": 7, "batch": 3}),
        (sd3, {"height": 8, "width": 20, "text": 3, "batch": 4}),
    ],
)
def test_the_formula_of_one_trace_holds_at_other_sizes(build, other, code):
    here, there = (trace(*build(**sizes)).coded(code).analysis for sizes in ({}, other))
    formula = CostModel(here.selection).caches((*here.selection.cached, *here.selection.known))
    assert Sizes.of(here.selection) != Sizes.of(there.selection)
    assert Sizes.of(there.selection).evaluate(formula) == there.signature.cache_bytes


def test_bytes_of_flux_by_hand():
    """Keys and values of each block: a code a channel, a float32 scale a head."""
    layers, batch, tokens, heads, width = 3, 2, 6 * 7 + 4, 2, 16
    plain = trace(*flux(layers=2, single_layers=1))
    rows = layers * 2 * batch * tokens * heads
    assert plain.analysis.signature.cache_bytes == rows * width * 4
    for code in CODES:
        assert plain.coded(code).analysis.signature.cache_bytes == rows * (width + 4)


# What is computed -------------------------------------------------------------------------------


def test_without_a_code_nothing_changes(found):
    assert quantized(found.analysis.selection, None) is found.analysis.selection
    assert not found.analysis.selection.codes
    shapes = [slot.dtype for slot in found.analysis.signature.caches]
    assert not set(shapes).intersection(CODES)


@pytest.mark.parametrize("code", CODES)
def test_oracle_2_is_exact(precise, code):
    """Stale rows are those that codes and scales tell, with text and without."""
    coded_found = precise[2].coded(code)
    assert coded_found.analysis.selection.codes.keys() == set(coded_found.analysis.selection.cached)
    programs = coded_found.programs()
    masked_dense(coded_found, programs, **EXACT)
    assert without_text(coded_found, programs, **EXACT)


@pytest.mark.parametrize(("code", "bound"), [(torch.int8, 0.02), (torch.float8_e4m3fn, 0.2)])
def test_oracles_1_and_3_hold_up_to_the_rounding(precise, code, bound):
    model, inputs, plain = precise
    found = plain.coded(code)
    analysis, programs = found.analysis, found.programs()
    signature = analysis.signature
    active = random_active(signature.batch, signature.lengths, 12)
    outputs = [value for value in model(**changed(inputs)) if value is not None]
    pairs = [
        *idempotence(analysis, programs, found.flat[0], active),
        *all_active(analysis, programs, *found.flat, outputs),
    ]
    for pair in pairs:
        assert pair.error < (1e-12 if pair.oracle == "dense" else bound)
    # and they are not exact, or nothing would have been coded
    assert max(pair.error for pair in pairs if pair.oracle == "all active") > 1e-6


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_row_keeps_its_largest_value_and_the_others_nearly(code, dtype):
    value = (torch.randn(2, 5, 3, 16) * torch.tensor([1e-3, 1.0, 100.0]).view(3, 1)).to(dtype)
    value[0, 0] = 0
    (codes, scale), back = round_trip(value, code)
    assert codes.dtype is code and scale.dtype is torch.float32
    assert back.dtype is dtype
    assert (back[0, 0] == 0).all()
    largest = value.double().abs().amax(-1, keepdim=True)
    step = 2 / 254 if code is torch.int8 else 32 / 448
    rounding = 2 * torch.finfo(dtype).eps
    error = (back.double() - value.double()).abs()
    assert (error <= largest * (step / 2 + rounding)).all()
    torch.testing.assert_close(back, coded(value, code), rtol=rounding, atol=0)
    # rows are coded one by one: a step that rewrites some gives what all would have
    some = round_trip(value[:, 1:3].contiguous(), code)[0]
    assert torch.equal(some[0].view(torch.int8), codes[:, 1:3].view(torch.int8))
    assert torch.equal(some[1], scale[:, 1:3])


@pytest.mark.parametrize("code", CODES)
def test_no_row_overflows(code):
    for extreme in (torch.finfo(torch.float32).max / 2, 1e-42):
        value = torch.full((1, 2, 16), extreme)
        value[..., 1] = -extreme
        assert round_trip(value, code)[1].isfinite().all()


def round_trip(value: Tensor, code: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Codes, scales, and what they tell."""
    module = torch.fx.symbolic_trace(nn.Identity())
    (node,) = module.graph.find_nodes(op="placeholder")
    with torch._subclasses.FakeTensorMode() as mode:
        node.meta["val"] = mode.from_tensor(value)
    writer = GraphWriter(module)
    kept = encode(writer, writer.copy_placeholder(node), code)
    writer.graph.output((*kept, decode(writer, kept, value.dtype)))
    *tensors, back = writer.to_module()(value)
    return tensors, back


def test_codes_reach_the_largest():
    assert [largest_code(code) for code in CODES] == [127, 448]


# What stays as it is ----------------------------------------------------------------------------


class Neighbours(Toy):
    """A convolution over tokens after an attention: its input lives in a cache, too."""

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        x = self.embed(hidden_states) + timestep.sin()[:, None, None]
        x = self.attention(x)
        x = x + F.avg_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2)
        return (self.head(self.attention(x)),)


def test_what_attention_does_not_read_stays_in_the_models_dtype():
    found = trace(randomize(Neighbours(lambda t, x: x)), toy_inputs())
    selection = quantized(found.analysis.selection, torch.int8)
    reasons = uncoded(selection, torch.int8)
    assert set(reasons.values()) == {"it is not the key or value of attentions alone"}
    assert set(reasons) == set(selection.cached) - set(selection.codes)
    assert len(reasons) == 1 and len(selection.codes) == 4
    summary = QuantizePass(torch.int8).summary(selection)
    assert summary.startswith("4 of 5 caches as torch.int8; 1 as they are: it is not the key")


def test_heads_too_narrow_for_a_scale():
    """Four channels in bfloat16 are eight bytes, as are their codes and a scale."""
    found = trace(*narrow(torch.bfloat16))
    selection = quantized(found.analysis.selection, torch.int8)
    assert not selection.codes
    assert set(uncoded(selection, torch.int8).values()) == {
        "codes and scales would take as much memory"
    }
    assert found.coded(torch.int8).analysis.signature == found.analysis.signature


def narrow(dtype: torch.dtype) -> tuple[nn.Module, Inputs]:
    model = randomize(Toy(lambda t, x: x)).to(dtype)
    inputs = {
        name: value.to(dtype) if isinstance(value, Tensor) else value
        for name, value in toy_inputs().items()
    }
    return model, inputs


def test_devices_without_float8(monkeypatch):
    found = trace(*flux()).analysis.selection
    monkeypatch.setattr(
        "specdiff.passes.select.quantize._unsupported", lambda device, code: "too old"
    )
    assert set(uncoded(found, torch.float8_e4m3fn).values()) == {"too old"}
    assert quantized(found, torch.float8_e4m3fn).codes == {}


def test_the_option_reaches_the_plan():
    model, inputs = flux()
    seen = []

    def backend(module, values):
        is_state = pipeline.module_states(module, values)
        for name in (None, *KV_CACHE_DTYPES):
            options = Options(kv_cache_dtype=name)
            traced = pipeline.trace(module, values, options, verify=True)
            seen.append(pipeline.analyse(traced, is_state, options))
        return module.forward

    torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(**inputs)
    assert [set(a.selection.codes.values()) for a in seen] == [set(), *({code} for code in CODES)]
    # off, the pass is not even run
    assert ["quantize" in [r.name for r in a.records] for a in seen] == [False, True, True]


# Programs ---------------------------------------------------------------------------------------


def test_only_active_rows_are_coded_by_a_selective_step():
    plain = trace(*flux()).analysis
    selection = quantized(plain.selection, torch.int8)
    graph = emit_selective(plain.module, selection, 8, 5).graph
    rounded = graph.find_nodes(op="call_function", target=aten.round.default)
    assert len(rounded) == len(selection.codes)
    assert {n.meta["val"].shape[1] for n in rounded} == {5 + 4}
    every = emit_dense(plain.module, selection, 8).graph
    written = every.find_nodes(op="call_function", target=aten.copy_.default)
    assert len(written) == 2 * len(selection.codes)
    # a dense step attends to the values themselves: nothing of it reads a code
    static = [n for n in every.find_nodes(op="placeholder") if n.meta.get("static")]
    assert len(static) == 2 * len(selection.codes)
    for node in static:
        assert {user.target for user in node.users} == {aten.copy_.default}
