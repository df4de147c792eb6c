"""A model in unusual clothes: dtypes, autocast, layouts, adapters, quantization, graph breaks."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

import specdiff
from specdiff.compiler import CHANGING
from specdiff.plan import Plan
from specdiff.runtime.blocks.block import RootCall
from specdiff.runtime.step.shapes import MAX_VALUES
from tests.helpers import counts
from tests.models import flux, sd3
from tests.models.case import Inputs

STEPS = 6
PLAN = {"plan": Plan.warmup(2), "cache_ratio": 0.5}
SELECTIVE = (2, 4, 0, 1)
"""What a generation of STEPS counts: two dense steps, then selective ones; one look ahead."""
DENSE = (STEPS, 0, 0, 0)
ROUNDING = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Relative to the largest magnitude: a few units in the last place."""
CLOSE = 0.3
"""Selective steps of these random models: 0.05 to 0.2 measured."""
Seen = list[tuple[Inputs, Tensor]]


def small_flux() -> tuple[nn.Module, Inputs]:
    return flux(rows=4, columns=5, batch=1)


def small_sd3() -> tuple[nn.Module, Inputs]:
    return sd3(height=8, width=12)


def compiled(
    model: nn.Module, fullgraph: bool = True, dynamic: bool | None = False, **options: Any
) -> Any:
    options = {"inner_backend": "eager", **PLAN, **options}
    return torch.compile(
        model, backend="specdiff", fullgraph=fullgraph, dynamic=dynamic, options=options
    )


def generate(
    model: Any, inputs: Inputs, steps: int = STEPS, before: Callable[[int], object] = lambda _: None
) -> Seen:
    """Every call of an Euler sampler and its answer; the latent keeps dtype and layout."""
    latent, seen = inputs["hidden_states"], []
    start = inputs["timestep"].new_tensor(1000.0 if inputs["timestep"].max() > 1 else 1.0)
    for index in range(steps):
        before(index)
        time = (start * (1 - index / steps)).expand(inputs["timestep"].shape)
        call = {**inputs, "hidden_states": latent, "timestep": time}
        with torch.no_grad():
            velocity = model(**call)[0]
        seen.append((call, velocity))
        latent = (latent - velocity / steps).to(latent.dtype)
    return seen


def errors(model: nn.Module, seen: Seen) -> list[float]:
    """Of every answer, against the untouched model, relative to the largest magnitude."""
    found = []
    for call, answer in seen:
        with torch.no_grad():
            exact = model(**call)[0]
        assert answer.dtype is exact.dtype
        found.append(float((answer.float() - exact.float()).abs().max() / exact.abs().max()))
    return found


def assert_generations(
    selective: Any, model: nn.Module, inputs: Inputs, dtype: torch.dtype = torch.float32
) -> None:
    """Dense steps are exact; then, by the same graph, a generation with selective ones is close."""
    specdiff.configure(selective, cache_ratio=0.0)
    assert max(errors(model, generate(selective, inputs))) <= ROUNDING[dtype]
    assert counts(selective) == DENSE
    specdiff.configure(selective, cache_ratio=0.5)
    specdiff.reset(selective)
    found = errors(model, generate(selective, inputs))
    assert max(found[:2]) <= ROUNDING[dtype]
    assert 1e-4 < max(found[2:]) < CLOSE
    assert counts(selective) == SELECTIVE
    assert specdiff.stats(selective).fallbacks == {}


def in_dtype(model: nn.Module, inputs: Inputs, dtype: torch.dtype) -> tuple[nn.Module, Inputs]:
    """Model and inputs as a pipeline of this dtype has them; positions stay float32."""
    cast = {
        name: value.to(dtype) if isinstance(value, Tensor) and not name.endswith("_ids") else value
        for name, value in inputs.items()
    }
    return model.to(dtype), cast


def cache_dtypes(model: nn.Module, inputs: Inputs) -> set[torch.dtype]:
    """Those of the caches of the one graph, after two steps that filled them."""
    held: list[Tensor] = []
    allocate = specdiff.program.CacheSlot.allocate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            specdiff.program.CacheSlot,
            "allocate",
            lambda slot: held.append(allocate(slot)) or held[-1],
        )
        generate(compiled(model), inputs, 2)
    return {cache.dtype for cache in held}


# Low precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("make", [small_flux, small_sd3])
def test_low_precision(make, dtype):
    model, inputs = in_dtype(*make(), dtype)
    assert_generations(compiled(model), model, inputs, dtype)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_low_precision_verifies(dtype):
    model, inputs = in_dtype(*small_flux(), dtype)
    verdict = specdiff.verify(model, **inputs)
    assert verdict.passed
    assert verdict.selective


@pytest.mark.slow
def test_bfloat16_through_inductor():
    model, inputs = in_dtype(*small_flux(), torch.bfloat16)
    selective = compiled(model, inner_backend="inductor")
    found = errors(model, generate(selective, inputs, 3))
    # measured: 0.01; Inductor rounds less often than eager
    assert max(found[:2]) <= ROUNDING[torch.bfloat16]
    assert max(found) < CLOSE
    assert counts(selective)[:2] == (2, 1)


# Autocast ---------------------------------------------------------------------------------------


def autocast(enabled: bool = True, dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    return torch.autocast("cpu", dtype, enabled=enabled)


@pytest.mark.parametrize("inner", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_autocast_around_the_model(inner):
    model, inputs = small_flux()
    selective = compiled(model, inner_backend=inner)
    with autocast():
        assert_generations(selective, model, inputs, torch.bfloat16)
    # outside: another graph, not the one of before
    specdiff.reset(selective)
    after = generate(selective, inputs, 3)
    assert after[0][1].dtype is torch.float32
    assert max(errors(model, after)[:2]) <= ROUNDING[torch.float32]
    assert counts(selective) == (2, 1, 0, 1)
    assert specdiff.stats(selective).recompiles == 1


@pytest.mark.slow
def test_autocast_around_a_model_whose_blocks_are_compiled_once(caplog):
    caplog.set_level("DEBUG", "specdiff.compiler")
    model, inputs = flux(5, 0, rows=4, columns=5, batch=1)
    selective = compiled(model, inner_backend="inductor")
    with autocast():
        found = errors(model, generate(selective, inputs, 3))
    assert max(found[:2]) <= ROUNDING[torch.bfloat16]
    assert max(found) < CLOSE
    assert counts(selective)[:2] == (2, 1)
    for program in ("dense", "selective"):
        assert re.search(rf"program {program}\S*: \d copies of", caplog.text)


@pytest.mark.slow
def test_caches_have_the_dtype_of_their_values_under_autocast():
    model, inputs = small_sd3()
    with autocast():
        assert cache_dtypes(model, inputs) == {torch.bfloat16}
        assert specdiff.verify(model, **inputs).passed
    torch._dynamo.reset()
    assert cache_dtypes(model, inputs) == {torch.float32}


@pytest.mark.slow
def test_leaving_autocast_within_a_generation():
    """The rest of the generation begins anew, without caches of the other dtype."""
    model, inputs = small_flux()
    selective = compiled(model)
    seen = generate(selective, inputs, 8, lambda step: torch.set_autocast_enabled("cpu", step < 4))
    with autocast():
        assert max(errors(model, seen[:2])) <= ROUNDING[torch.bfloat16]
    assert max(errors(model, seen[4:6])) <= ROUNDING[torch.float32]
    assert counts(selective)[:2] == (4, 4)


@pytest.mark.slow
def test_autocast_entered_within_a_generation_of_blocks(monkeypatch):
    """Compiled block by block: caches of one dtype are not those of a block traced in another."""
    model, inputs = small_sd3()
    for block in model.transformer_blocks:
        block.compile(backend="specdiff", options={"inner_backend": "eager"})
    specdiff.attach(model, **PLAN)
    caches: list[tuple[Tensor, ...]] = []
    run = RootCall._run

    def watched(call: RootCall, programs: Any, *given: Any) -> Any:
        if call.kind != "probe":
            dtypes = [slot.dtype for slot in programs.slots]
            assert [cache.dtype for cache in call.caches[: len(dtypes)]] == dtypes
            caches.append(tuple(call.caches))
        return run(call, programs, *given)

    monkeypatch.setattr(RootCall, "_run", watched)
    generate(model, inputs, 8, lambda step: torch.set_autocast_enabled("cpu", step >= 4))
    torch.set_autocast_enabled("cpu", False)
    assert caches


@pytest.fixture(autouse=True)
def _autocast_off():
    yield
    left_on = torch.is_autocast_enabled("cpu")
    torch.set_autocast_enabled("cpu", False)
    assert not left_on


class Under(nn.Module):
    """A part of a model with an autocast region of its own; gives float32."""

    def __init__(self, inner: nn.Module, enabled: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.enabled, self.dtype = inner, enabled, dtype

    def forward(self, x: Tensor) -> Tensor:
        with autocast(self.enabled, self.dtype):
            return self.inner(x.float())


REASON = "no tokens can be selected: a part of the model runs under torch.autocast("


@pytest.mark.parametrize(
    ("outside", "inside", "dtype", "plain"),
    [
        (False, False, torch.bfloat16, True),
        (True, True, torch.bfloat16, True),
        (False, True, torch.bfloat16, False),
        (True, False, torch.bfloat16, False),
        (True, True, torch.float16, False),
    ],
)
def test_autocast_inside_the_model(outside, inside, dtype, plain, caplog):
    model, inputs = small_flux()
    part = model.transformer_blocks[0]
    part.ff = Under(part.ff, inside, dtype)
    selective = compiled(model)
    with autocast(outside):
        seen = generate(selective, inputs, 3)
        found = errors(model, seen)
    assert max(found[:2]) <= ROUNDING[torch.bfloat16 if outside else torch.float32]
    fallbacks = specdiff.stats(selective).fallbacks
    assert counts(selective)[:2] == ((2, 1) if plain else (3, 0))
    assert fallbacks == ({} if plain else {"no tokens can be selected": 1})
    said = [message for message in caplog.messages if message.startswith(REASON)]
    assert len(said) == (0 if plain else 1)


# Layouts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [pytest.param(small_flux, marks=pytest.mark.slow), small_sd3])
def test_merged_projections(make):
    """One linear layer for query, key and value, as diffusers merges them for GPUs."""
    apart, inputs = make()
    merged = copy.deepcopy(apart)
    merged.fuse_qkv_projections()
    assert any("to_qkv" in name for name, _ in merged.named_modules())
    assert specdiff.verify(merged, **inputs).selective
    expected, found = (generate(compiled(model), inputs)[-1][1] for model in (apart, merged))
    torch.testing.assert_close(found, expected)


def channels_last(latent: Tensor) -> Tensor:
    return latent.to(memory_format=torch.channels_last)


def transposed(latent: Tensor) -> Tensor:
    return latent.mT.contiguous().mT


@pytest.mark.parametrize("layout", [channels_last, transposed])
def test_latent_in_another_layout(layout):
    model, inputs = small_sd3()
    inputs["hidden_states"] = layout(inputs["hidden_states"])
    assert not inputs["hidden_states"].is_contiguous()
    assert_generations(compiled(model), model, inputs)
    assert specdiff.stats(model).graphs == 1


def test_expanded_latent():
    """The sampler makes it contiguous at once: another graph, and three dense steps."""
    model, inputs = small_sd3()
    inputs["hidden_states"] = inputs["hidden_states"][:1].expand(2, -1, -1, -1)
    selective = compiled(model)
    found = errors(model, generate(selective, inputs))
    assert max(found[:3]) <= ROUNDING[torch.float32]
    assert max(found) < CLOSE
    assert counts(selective) == (3, 3, 0, 1)


# Adapters ---------------------------------------------------------------------------------------


def add_adapter(model: Any, name: str) -> None:
    from peft import LoraConfig

    config = LoraConfig(
        r=2,
        lora_alpha=4,
        init_lora_weights=False,  # random and not zero
        target_modules=["to_q", "to_k", "to_v", "to_out.0"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter(config, adapter_name=name)
    model.eval()


def assert_first_steps_exact(selective: Any, model: nn.Module, inputs: Inputs) -> None:
    """A generation that begins with dense steps of the model as it is now."""
    specdiff.reset(selective)
    found = errors(model, generate(selective, inputs))
    assert max(found[:2]) <= ROUNDING[torch.float32]
    assert max(found) < CLOSE
    assert counts(selective) == SELECTIVE


def test_adapter():
    pytest.importorskip("peft")
    model, inputs = small_flux()
    bare = copy.deepcopy(model)
    add_adapter(model, "one")
    selective = compiled(model)
    assert_generations(selective, model, inputs)
    assert max(errors(bare, generate(selective, inputs, 2))) > 0.01


def test_switched_adapters():
    pytest.importorskip("peft")
    model, inputs = small_flux()
    add_adapter(model, "one")
    selective = compiled(model)
    generate(selective, inputs, 4)
    add_adapter(model, "two")
    model.set_adapter("two")
    assert_first_steps_exact(selective, model, inputs)
    model.disable_adapters()
    assert_first_steps_exact(selective, model, inputs)


def test_adapter_switched_within_a_generation():
    pytest.importorskip("peft")
    model, inputs = small_flux()
    add_adapter(model, "one")
    add_adapter(model, "two")
    model.set_adapter("one")
    selective = compiled(model)
    seen = generate(selective, inputs, 8, lambda i: i == 4 and model.set_adapter("two"))
    found = errors(model, seen)
    assert max(found[4:6]) <= ROUNDING[torch.float32]
    assert min(found[:4]) > 0.01  # those were of the other one
    assert counts(selective)[:2] == (4, 4)


def weaker(model: nn.Module) -> None:
    """Each adapter's strength halved: a number in the graphs, no other parameters."""
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("one", 0.5)


@pytest.mark.slow
def test_strength_of_an_adapter_that_changes():
    """Dynamo makes it an input at its second value, and specdiff a constant of each value's own."""
    pytest.importorskip("peft")
    model, inputs = small_flux()
    add_adapter(model, "one")
    layers = [module for module in model.modules() if hasattr(module, "set_scale")]
    selective = compiled(model, dynamic=None)
    generate(selective, inputs, 1)
    for strength in (0.5, 0.25):
        for layer in layers:
            layer.set_scale("one", strength)
        assert_first_steps_exact(selective, model, inputs)
    for number in range(MAX_VALUES + 1):
        for layer in layers:
            layer.set_scale("one", 0.1 + number / 10)
        assert max(errors(model, generate(selective, inputs, 1))) <= ROUNDING[torch.float32]
    assert set(specdiff.stats(selective).fallbacks) == {CHANGING}


@pytest.mark.parametrize(
    "change",
    [lambda model: model.set_adapter("two"), pytest.param(weaker, marks=pytest.mark.slow)],
    ids=["other", "weaker"],
)
def test_adapter_changed_within_a_generation_of_blocks(change):
    """Caches and history that one adapter has filled are not read under another."""
    pytest.importorskip("peft")
    model, inputs = small_flux()
    add_adapter(model, "one")
    add_adapter(model, "two")
    model.set_adapter("one")
    before, after = copy.deepcopy(model), copy.deepcopy(model)
    change(after)
    model.compile_repeated_blocks(backend="specdiff", options={"inner_backend": "eager"})
    specdiff.attach(model, **PLAN)
    seen = generate(model, inputs, 8, lambda step: step == 4 and change(model))
    assert max(errors(before, seen[:2])) <= ROUNDING[torch.float32]
    assert max(errors(after, seen[4:6])) <= ROUNDING[torch.float32]
    assert min(errors(after, seen[:4])) > 0.01
    assert counts(model)[:2] == (4, 4)


# Quantization -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
def test_quantized_linears_are_forecast_by_whole_steps(dynamic):
    """Weights are tensor subclasses, which the export of a graph does not take."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, inputs = in_dtype(*small_flux(), torch.bfloat16)
    quantize_(model, Int8WeightOnlyConfig())
    options = {"inner_backend": "eager", "plan": Plan((0, 1, 0))}
    compiled = torch.compile(model, backend="specdiff", dynamic=dynamic, options=options)
    first, _, last = errors(model, generate(compiled, inputs, 3))
    assert max(first, last) <= ROUNDING[torch.bfloat16]
    assert counts(compiled) == (2, 0, 1, 0)
    assert specdiff.stats(compiled).fallbacks == {}


# Graph breaks and other processors --------------------------------------------------------------


class After(nn.Module):
    """A part of a model that does something first."""

    def __init__(self, inner: nn.Module, effect: Callable[[], object]) -> None:
        super().__init__()
        self.inner, self.effect = inner, effect

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.effect()
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize(
    "effect",
    [
        pytest.param(torch._dynamo.graph_break, id="break"),
        pytest.param(lambda: print("called"), id="print", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("place", ["block", "mlp"])
def test_graph_break(place, effect, capsys):
    model, inputs = small_flux()
    block = model.transformer_blocks[0]
    if place == "block":
        model.transformer_blocks[0] = After(block, effect)
    else:
        block.ff = After(block.ff, effect)
    broken = compiled(model, fullgraph=False)
    specdiff.configure(broken, cache_ratio=0.5)  # makes all pieces known as this model's
    seen = generate(broken, inputs, 3)
    assert effect is torch._dynamo.graph_break or capsys.readouterr().out == "called\n" * 3
    assert max(errors(model, seen)) <= ROUNDING[torch.float32]
    found = specdiff.stats(broken)
    assert (found.selective, found.skipped) == (0, 0)
    assert found.graphs > 1
    assert sum(found.fallbacks.values()) == found.dense


class Halved(FluxAttnProcessor):
    """An attention of half the strength."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = super().__call__(*args, **kwargs)
        return tuple(x / 2 for x in found) if isinstance(found, tuple) else found / 2


def test_processor_swapped_within_a_generation():
    model, inputs = small_flux()
    selective = compiled(model)
    seen = generate(selective, inputs, 8, lambda i: i == 4 and model.set_attn_processor(Halved()))
    found = errors(model, seen)
    assert max(found[4:6]) <= ROUNDING[torch.float32]
    assert min(found[:2]) > 0.01
    assert counts(selective)[:2] == (4, 4)


# Grad modes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_inference_mode_gives_the_same(inner):
    model, inputs = small_flux()
    expected = generate(compiled(model), inputs, 3)
    assert counts(model) == (2, 1, 0, 1)
    specdiff.reset(model)
    torch._dynamo.reset()
    with torch.inference_mode():
        own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        found = generate(compiled(model, inner_backend=inner), own, 3)
        assert counts(model) == (2, 1, 0, 1)
        for (_, answer), (_, other) in zip(found, expected, strict=True):
            torch.testing.assert_close(answer, other)
