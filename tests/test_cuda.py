"""On a CUDA device: CUDA graphs, streams, synchronisation. Skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.cudagraph_trees import get_manager

import specdiff
from specdiff.bench.geometries import Geometry, Sampler, build
from specdiff.passes.share.outline import share_repeats
from specdiff.plan import Plan
from tests.models import flux, sd3

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SIZES = {
    "flux": Geometry("flux", 4, 4, 2, 64, 16, 8, prompt_width=64, pooled_width=32),
    "sd3": Geometry("sd3", 5, 0, 2, 64, 16, 8, prompt_width=64, pooled_width=32),
}
"""Deep enough for three blocks to be alike: the first of a kind is not, nor is SD3's last."""
OPTIONS = {"method": "paper", "cache_ratio": 0.75}
ROUNDED = {"rtol": 1e-4, "atol": 1e-4}
"""Of float32, whose rounding stays far below this over a run and hardly ever chooses tokens."""


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdiff.bench.geometries.GEOMETRIES", SIZES)


@pytest.fixture(params=SIZES)
def sampler(request: Any, sizes: None) -> Sampler:
    return build(request.param, torch.device("cuda"), torch.bfloat16, steps=8)


@pytest.fixture(params=SIZES)
def exact(request: Any, sizes: None) -> Sampler:
    return build(request.param, torch.device("cuda"), torch.float32, steps=8)


@pytest.fixture
def no_sync() -> Iterator[Any]:
    """Call it to make every synchronisation with the device an error from there on."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def compiled(sampler: Sampler, mode: str | None = None, **options: Any) -> Any:
    backend = specdiff.backend(**{**OPTIONS, **options})
    return torch.compile(sampler.model, backend=backend, mode=mode, fullgraph=True)


def picture(sampler: Sampler, model: Any) -> Tensor:
    with specdiff.session(model, timesteps=sampler.timesteps()):
        return sampler.run(model)


@pytest.mark.parametrize("build_model", [flux, sd3])
def test_oracles_on_the_device(build_model):
    model, inputs = build_model()
    inputs = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    verdict = specdiff.verify(model.cuda(), **inputs)
    assert verdict.selective
    assert verdict.passed, verdict


@pytest.mark.parametrize("codes", [None, "int8", "fp8_e4m3"])
def test_cuda_graphs_change_nothing(exact, codes):
    """Later pictures replay what was recorded."""
    options = {} if codes is None else {"kv_cache_dtype": codes}
    plain = compiled(exact, **options)
    expected = [picture(exact, plain) for _ in range(2)]
    torch.testing.assert_close(*expected, **ROUNDED)
    torch.compiler.reset()
    counters.clear()
    graphs = compiled(exact, "reduce-overhead", **options)
    for _ in range(3):
        torch.testing.assert_close(picture(exact, graphs), expected[0], **ROUNDED)
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_blocks_compiled_once_change_nothing(exact, monkeypatch):
    found: list[int] = []

    def noting(program: Any, call: Any) -> Any:
        result, graphs = share_repeats(program, call)
        found.append(len(graphs))
        return result, graphs

    with monkeypatch.context() as patch:
        patch.setattr("specdiff.compiler.share_repeats", lambda program, call: (program, []))
        expected = picture(exact, compiled(exact, "reduce-overhead"))
    torch.compiler.reset()
    monkeypatch.setattr("specdiff.compiler.share_repeats", noting)
    shared = compiled(exact, "reduce-overhead")
    for _ in range(3):
        torch.testing.assert_close(picture(exact, shared), expected, **ROUNDED)
    kinds = 2 if exact.geometry.family == "flux" else 1
    assert found.count(kinds) == 2, "the dense and the selective program"


@pytest.mark.parametrize("geometry", SIZES)
def test_max_autotune_changes_nothing(geometry, sizes):
    """Of few blocks: it tries twenty kernels for every shape.

    They round otherwise, so no tokens are chosen here: steps are forecast whole.
    """
    exact = build(geometry, torch.device("cuda"), torch.float32, steps=8, depth=0.3)
    whole = {"method": "history", "plan": Plan.tapered(4), "cache_ratio": 1.0}
    expected = picture(exact, compiled(exact, **whole))
    torch.compiler.reset()
    tuned = compiled(exact, "max-autotune", **whole)
    for _ in range(3):
        torch.testing.assert_close(picture(exact, tuned), expected, **ROUNDED)


def test_outputs_belong_to_the_caller(sampler):
    """Under CUDA graphs an output would be overwritten by the next evaluation."""
    model = compiled(sampler, "reduce-overhead")
    outputs: list[tuple[Tensor, Tensor]] = []

    def kept(**inputs: Any) -> Any:
        result = model(**inputs)
        outputs.append((result[0], result[0].clone()))
        return result

    with specdiff.session(model, timesteps=sampler.timesteps()):
        sampler.run(kept)
    assert len(outputs) == 8
    for output, copy in outputs:
        assert torch.equal(output, copy)


def test_two_streams_take_turns(exact):
    """Each has caches at addresses of its own, which the recorded graphs must tell apart."""
    model = compiled(exact, "reduce-overhead")
    picture(exact, model)
    alone = picture(exact, model)
    latents = [exact.noise, exact.noise]
    times = exact.timesteps()
    sessions = [specdiff.session(model, timesteps=times) for _ in latents]
    schedulers = [exact._scheduler() for _ in latents]
    for time in times:
        for index, (session, scheduler) in enumerate(zip(sessions, schedulers, strict=True)):
            with session, torch.no_grad():
                latents[index] = step(exact, model, scheduler, latents[index], time)
    for latent in latents:
        torch.testing.assert_close(latent, alone, **ROUNDED)


def step(sampler: Sampler, model: Any, scheduler: Any, latent: Tensor, time: Tensor) -> Tensor:
    velocity = model(**sampler._call(latent, time))[0]
    if sampler.guided:
        uncond, cond = velocity.chunk(2)
        velocity = uncond + 7.0 * (cond - uncond)
    return scheduler.step(velocity, time, latent, return_dict=False)[0]


def calls_of(sampler: Sampler, model: Any) -> list[dict[str, Any]]:
    """What a run hands to the model, step by step: a latent that moves."""
    calls: list[dict[str, Any]] = []

    def kept(**inputs: Any) -> Any:
        calls.append(inputs)
        return model(**inputs)

    with specdiff.session(model, timesteps=sampler.timesteps()):
        sampler.run(kept)
    return calls


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("method", ["paper", "history"])
def test_explicit_sessions_never_wait_for_the_device(sampler, mode, method, no_sync):
    model = compiled(sampler, mode, method=method)
    times = sampler.timesteps().cpu()
    calls = [calls_of(sampler, model) for _ in range(2)][-1]
    with specdiff.session(model, timesteps=times), torch.no_grad():
        no_sync()
        for call in calls:
            model(**call)


def test_nothing_compiles_after_the_first_picture(sampler):
    model = compiled(sampler, "reduce-overhead")
    picture(sampler, model)
    compiled_before = counters["stats"]["unique_graphs"], counters["inductor"]["fxgraph_cache_miss"]
    for _ in range(2):
        picture(sampler, model)
    now = counters["stats"]["unique_graphs"], counters["inductor"]["fxgraph_cache_miss"]
    assert now == compiled_before


def test_cuda_graphs_copy_neither_weights_nor_caches(sampler):
    """A recorded graph copies only what the caller makes anew, active tokens and a row number."""
    model = compiled(sampler, "reduce-overhead")
    for _ in range(3):
        picture(sampler, model)
    made = [value for value in sampler.first_call().values() if isinstance(value, Tensor)]
    recorded = list(recorded_graphs())
    # dense with the caches and with the scratch set, selective; FLUX's tail has no kernel
    assert len(recorded) >= 3
    for node in recorded:
        assert len(node.non_static_input_idx) <= len(made) + 2


def recorded_graphs() -> Iterator[Any]:
    """Every CUDA graph of the current device."""
    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    pending = [node for nodes in manager.roots.values() for node in nodes]
    while pending:
        node = pending.pop()
        pending += [child for children in node.children.values() for child in children]
        yield node
