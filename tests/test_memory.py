"""Bytes of caches: said before they are allocated, never exceeded, less with `kv_cache_dtype`."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import specdiff
from specdiff.options import KV_CACHE_DTYPES
from specdiff.plan import Plan
from specdiff.program import CacheSlot
from specdiff.runtime.streams.stream import Stream
from tests.models import Inputs, flux, sd3
from tests.oracles import trace
from tests.passes.emit.test_lower import allocations, executed, inductor_code

PLAN = {"method": "paper", "plan": Plan.warmup(2, lookahead=0), "cache_ratio": 0.5}
EAGER = {"inner_backend": "eager"}
MODELS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "flux": flux,
    "one stream": lambda: flux(layers=0, single_layers=2, batch=1),
    "sd3, guided": sd3,
}
NAMES = [None, *KV_CACHE_DTYPES]
BUDGET = "cache budget exceeded"


def named(name: str | None) -> dict[str, str]:
    return {} if name is None else {"kv_cache_dtype": name}


def compiled(model: nn.Module, **options: Any) -> Any:
    options = {**EAGER, **PLAN, **options}
    return torch.compile(model, backend="specdiff", fullgraph=True, dynamic=False, options=options)


@torch.no_grad()
def generation(model: Any, inputs: Inputs, steps: int = 6) -> list[Tensor]:
    """Euler on a flow, the model's outputs."""
    latent, outputs = inputs["hidden_states"], []
    for now, then in pairwise(torch.linspace(1, 0, steps + 1)):
        time = torch.full_like(inputs["timestep"], float(now))
        velocity = model(**{**inputs, "hidden_states": latent, "timestep": time})[0]
        outputs.append(velocity.clone())
        latent = latent + (then - now) * velocity
    return outputs


class Allocated:
    """Bytes of caches that are alive, and the most that ever were."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = self.most = 0
        allocate = CacheSlot.allocate

        def counted(slot: CacheSlot) -> Tensor:
            tensor = allocate(slot)
            size = tensor.untyped_storage().nbytes()
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(tensor, self._free, size)
            return tensor

        patch.setattr(CacheSlot, "allocate", counted)

    def _free(self, size: int) -> None:
        self.now -= size


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> Allocated:
    return Allocated(monkeypatch)


QUICK_SIZES = [("flux", "int8"), ("one stream", None), ("sd3, guided", "fp8_e4m3")]


@pytest.mark.parametrize(
    ("build", "name"),
    [
        case if case in QUICK_SIZES else pytest.param(*case, marks=pytest.mark.slow)
        for case in product(MODELS, NAMES)
    ],
)
def test_what_explain_says_is_what_is_allocated(build, name, allocated):
    model, inputs = MODELS[build]()
    report = specdiff.explain(model, **inputs, options=named(name))
    assert allocated.most == 0
    predicted = report.sizes.evaluate(report.cache_formula)
    assert predicted == report.cache_bytes == report.analysis.signature.cache_bytes > 0
    assert f"a generation, {report.cache_formula} bytes" in str(report)
    selective = compiled(model, **named(name))
    generation(selective, inputs)
    found = specdiff.stats(selective)
    assert found.selective > 0 and not found.fallbacks
    assert allocated.most == found.cache_bytes == predicted


@pytest.mark.parametrize(
    "sets", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_no_budget_is_ever_exceeded(sets, allocated):
    """Three generations in turns, and room for fewer: the others run dense, with the reason."""
    model, inputs = flux()
    size = specdiff.explain(model, **inputs).cache_bytes
    budget = sets * size + size // 2
    selective = compiled(model, max_cache_bytes=budget)
    exact = generation(model, inputs)
    sessions = [specdiff.session(selective) for _ in range(3)]
    latents = [inputs["hidden_states"]] * 3
    with torch.no_grad():
        for now, then in pairwise(torch.linspace(1, 0, 7)):
            time = torch.full_like(inputs["timestep"], float(now))
            for index, session in enumerate(sessions):
                call = {**inputs, "hidden_states": latents[index], "timestep": time}
                with session:
                    velocity = selective(**call)[0]
                assert allocated.most <= budget
                latents[index] = latents[index] + (then - now) * velocity
    found = specdiff.stats(selective)
    assert found.fallbacks.keys() == {BUDGET}
    assert allocated.most == sets * size
    assert (found.selective > 0) == (sets > 0)
    if not sets:
        torch.testing.assert_close(generation(selective, inputs), exact, rtol=0, atol=1e-5)


def test_a_budget_that_only_codes_fit(allocated):
    model, inputs = flux()
    budget = specdiff.explain(model, **inputs, options={"kv_cache_dtype": "int8"}).cache_bytes
    plain = compiled(copy.deepcopy(model), max_cache_bytes=budget)
    generation(plain, inputs)
    assert specdiff.stats(plain).selective == 0 == allocated.most
    assert specdiff.stats(plain).fallbacks.keys() == {BUDGET}
    torch.compiler.reset()
    small = compiled(model, max_cache_bytes=budget, kv_cache_dtype="int8")
    generation(small, inputs)
    assert specdiff.stats(small).selective > 0
    assert allocated.most == budget


QUICK_CODES = ["int8", pytest.param("fp8_e4m3", marks=pytest.mark.slow)]


# Generations ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bound", "text_steps"),
    [
        ("int8", 2e-3, "dense"),
        pytest.param("int8", 2e-3, "all", marks=pytest.mark.slow),
        pytest.param("fp8_e4m3", 1e-2, "dense", marks=pytest.mark.slow),
        pytest.param("fp8_e4m3", 1e-2, "all", marks=pytest.mark.slow),
    ],
)
def test_pictures_stay_close(name, bound, text_steps):
    model, inputs = flux(layers=2)
    exact = generation(compiled(copy.deepcopy(model), text_steps=text_steps), inputs)
    torch.compiler.reset()
    selective = compiled(model, text_steps=text_steps, kv_cache_dtype=name)
    coded = generation(selective, inputs)
    assert specdiff.stats(selective).selective > 0
    apart = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(coded, exact, strict=True)]
    assert apart[0] == apart[1] == 0  # dense steps read no cache
    # later steps may choose other tokens
    assert 0 < apart[2] < bound


@pytest.mark.parametrize("name", list(KV_CACHE_DTYPES))
def test_two_streams_keep_caches_of_their_own(name):
    model, inputs = flux()
    other = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"] + 1}
    selective = compiled(model, kv_cache_dtype=name)
    alone = [generation(selective, call) for call in (inputs, other)]
    specdiff.reset(selective)
    runs = [turns(selective, call) for call in (inputs, other)]
    both = list(zip(*runs, strict=True))
    for index in range(2):
        torch.testing.assert_close([step[index] for step in both], alone[index], rtol=0, atol=0)


def turns(model: Any, inputs: Inputs, steps: int = 6) -> Any:
    """A generation, step by step."""
    latent = inputs["hidden_states"]
    for now, then in pairwise(torch.linspace(1, 0, steps + 1)):
        time = torch.full_like(inputs["timestep"], float(now))
        with torch.no_grad():
            velocity = model(**{**inputs, "hidden_states": latent, "timestep": time})[0].clone()
        latent = latent + (then - now) * velocity
        yield velocity


@pytest.mark.parametrize("name", QUICK_CODES)
def test_blocks_do_what_the_whole_graph_does(name):
    model, inputs = flux(layers=2)
    expected = generation(compiled(copy.deepcopy(model), kv_cache_dtype=name), inputs)
    plain = attached(copy.deepcopy(model), inputs, None)
    blocks, found = attached(model, inputs, name)
    # in float32 a sum in another order may move a value over the border between two codes
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert specdiff.stats(blocks).selective > 0
    assert specdiff.stats(blocks).cache_bytes < specdiff.stats(plain[0]).cache_bytes


def attached(model: nn.Module, inputs: Inputs, name: str | None) -> tuple[nn.Module, list[Tensor]]:
    model.compile_repeated_blocks(
        backend="specdiff", fullgraph=True, options={**EAGER, **named(name)}
    )
    specdiff.attach(model, **PLAN)
    return model, generation(model, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_16_bits(dtype):
    model, inputs = flux()
    cast = {
        k: v.to(dtype) if not k.endswith("_ids") and isinstance(v, Tensor) else v
        for k, v in inputs.items()
    }
    selective = compiled(model.to(dtype), kv_cache_dtype="int8")
    assert all(output.isfinite().all() for output in generation(selective, cast))
    assert specdiff.stats(selective).selective > 0


@pytest.mark.parametrize("name", QUICK_CODES)
def test_verify_measures_what_codes_cost(name):
    model, inputs = flux()
    exact, coded = (specdiff.verify(model, options=named(n), **inputs) for n in (None, name))
    assert exact.passed and coded.passed, coded
    (errors,) = (graph.errors for graph in coded.graphs)
    assert exact.max_error < 1e-5 < errors["idempotence"]
    with pytest.raises(specdiff.OptionError, match="one of 'int8', 'fp8_e4m3'"):
        specdiff.verify(model, options={"kv_cache_dtype": "int4"}, **inputs)


# What Inductor makes of it ----------------------------------------------------------------------


@pytest.mark.parametrize("name", QUICK_CODES)
def test_codes_are_written_and_read_in_place(name, monkeypatch):
    """No copy of codes is made; of values only what attention reads, keys and values of each."""
    model, inputs = flux(rows=12, columns=14, batch=1)
    with torch.no_grad():
        found = trace(model, inputs).coded(KV_CACHE_DTYPES[name])
    code = inductor_code(found, "selective", monkeypatch)
    codes = [slot for slot in found.analysis.signature.caches if slot.dtype.itemsize == 1]
    size = codes[0].nbytes
    buffers = re.findall(r"empty_strided_cpu\(\(([^)]*)\), \([^)]*\), torch\.(\w+)\)", code)
    assert {kind for _, kind in buffers}.isdisjoint({"int8", "float8_e4m3fn"})
    large = [count for count in allocations(code) if count >= size]
    assert large == [size] * len(large) and len(large) <= len(codes)
    assert "copy_(" not in code and "scatter" not in code
    called = set(re.findall(r"(?:torch\.ops\.aten|aten|extern_kernels)\.(\w+)", executed(code)))
    assert called == {"addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu"}


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("int8", "one stream"),
        pytest.param("int8", "flux", marks=pytest.mark.slow),
        pytest.param("fp8_e4m3", "flux", marks=pytest.mark.slow),
    ],
)
def test_inductor_agrees(name, build):
    """A picture by compiled programs; codes at a border may differ."""
    model, inputs = MODELS[build]()
    exact = generation(compiled(copy.deepcopy(model), kv_cache_dtype=name), inputs, 4)
    torch.compiler.reset()
    found = generation(compiled(model, kv_cache_dtype=name, inner_backend="inductor"), inputs, 4)
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-2)


@pytest.fixture(autouse=True)
def _collected():
    yield
    torch.compiler.reset()
    gc.collect()


def held(stream: Stream) -> int:
    """Bytes of what a stream keeps for its step plan."""
    history, correction = stream.history, stream.fit.correction
    tensors = [output.tokens for output in (*history.steps, *history.computed)]
    for seen in stream.trail.seen:
        tensors += [*seen.latents, *sum(seen.predictions, ())]
    tensors += [correction.missing, correction.withheld] if correction else []
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize(("build", "guidance"), [(flux, None), (sd3, 4.0)], ids=["flux", "sd3"])
def test_a_step_plan_keeps_what_explain_says_at_most(build, guidance):
    model, inputs = build()
    said = specdiff.explain(model, **inputs, options={"guidance_scale": guidance})
    assert f"keeps at most {said.kept_bytes / 2**20:.1f} MiB a generation" in str(said)
    specdiff.attach(model, guidance_scale=guidance)
    times = torch.linspace(1, 0, 13)[:-1]
    with specdiff.session(model, timesteps=times) as session:
        generation(model, inputs, steps=12)
        ((stream,),) = session._tables.values()
        assert said.kept_bytes / 2 < held(stream) <= said.kept_bytes
