"""diffusers' own pipelines, unmodified, and the ways in which they drive a transformer."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
)
from diffusers.callbacks import PipelineCallback
from torch import Tensor, nn

import specdiff
from specdiff.runtime.step.step import CONTINUED
from tests.helpers import THREE_DENSE, counts
from tests.models import flux, sd3

STEPS = 10
"""Three dense evaluations at the start of a generation, then selective ones only."""
EXACT: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5}
ROWS, COLUMNS = 4, 6
TOKENS = ROWS * COLUMNS
ACTIVE = TOKENS // 4


def compiled(model: nn.Module, dynamic: bool | None = False, **options: Any) -> Any:
    options = {"inner_backend": "eager", **THREE_DENSE, **options}
    return torch.compile(
        model, backend="specdiff", fullgraph=True, dynamic=dynamic, options=options
    )


def apart(image: Tensor, reference: Tensor) -> float:
    return ((image - reference).norm() / reference.norm()).item()


def embeddings(seed: int, text: int, channels: int = 24, pooled: int = 20) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return [
        torch.randn(1, text, channels, generator=generator),
        torch.randn(1, pooled, generator=generator),
    ]


def flux_image(
    transformer: Any,
    seed: int = 0,
    scheduler: Any = None,
    rows: int = ROWS,
    columns: int = COLUMNS,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Tensor:
    """The latent image [1, N, 8] that the unmodified FluxPipeline makes."""
    pipe = FluxPipeline(
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    prompt, pooled = embeddings(seed, text=4)
    return pipe(
        prompt_embeds=prompt.to(dtype),
        pooled_prompt_embeds=pooled.to(dtype),
        height=16 * rows,
        width=16 * columns,
        num_inference_steps=steps,
        output_type="latent",
        generator=torch.Generator().manual_seed(seed),
        **kwargs,
    ).images


def sd3_image(
    transformer: Any,
    seed: int = 0,
    scheduler: Any = None,
    height: int = 8,
    width: int = 12,
    steps: int = STEPS,
    **kwargs: Any,
) -> Tensor:
    """The latent [1, 4, height, width] of StableDiffusion3Pipeline; both CFG halves in a batch."""
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    prompt, pooled = embeddings(seed, text=5)
    other, other_pooled = embeddings(seed + 1, text=5)
    return pipe(
        prompt_embeds=prompt,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=other,
        negative_pooled_prompt_embeds=other_pooled,
        guidance_scale=7.0,
        height=8 * height,
        width=8 * width,
        num_inference_steps=steps,
        output_type="latent",
        generator=torch.Generator().manual_seed(seed),
        **kwargs,
    ).images


def sd3_5() -> nn.Module:
    return sd3(qk_norm="rms_norm", dual=(0,), layers=2)[0]


class Run:
    """One generation driven by hand, as a pipeline does: one prompt tensor, an Euler sampler."""

    def __init__(
        self,
        model: Any,
        seed: int = 0,
        prompt: list[Tensor] | None = None,
        rows: int = ROWS,
        columns: int = COLUMNS,
        steps: int = STEPS,
    ) -> None:
        self.model = model
        generator = torch.Generator().manual_seed(seed)
        self.latent = torch.randn(1, rows * columns, 8, generator=generator)
        self.prompt = embeddings(seed, text=4) if prompt is None else prompt
        self.sigmas = torch.linspace(1, 0, steps + 1)
        self.places = torch.cartesian_prod(
            torch.zeros(1), torch.arange(rows) * 1.0, torch.arange(columns) * 1.0
        )
        self.text_places = torch.zeros(4, 3)
        self.velocities: list[Tensor] = []
        self.inputs: list[dict[str, Any]] = []

    @torch.no_grad()
    def step(self, count: int = 1) -> Run:
        for _ in range(count):
            index = len(self.velocities)
            now, then = self.sigmas[index : index + 2]
            inputs = {
                "hidden_states": self.latent,
                "encoder_hidden_states": self.prompt[0],
                "pooled_projections": self.prompt[1],
                "timestep": now.expand(1),
                "img_ids": self.places,
                "txt_ids": self.text_places,
                "return_dict": False,
            }
            velocity = self.model(**inputs)[0]
            self.inputs.append(inputs)
            self.velocities.append(velocity)
            self.latent = self.latent + (then - now) * velocity
        return self

    def finish(self) -> Run:
        return self.step(len(self.sigmas) - 1 - len(self.velocities))

    def assert_same(self, other: Run) -> None:
        torch.testing.assert_close(self.velocities, other.velocities, **EXACT)


@pytest.fixture
def model() -> nn.Module:
    return flux()[0]


def alone(model: nn.Module, seed: int = 0, **kwargs: Any) -> Run:
    """A generation that has a fresh copy of the model to itself."""
    return Run(compiled(copy.deepcopy(model)), seed, **kwargs).finish()


# Whole pipelines ------------------------------------------------------------------------------


def test_flux_pipeline(model):
    exact = flux_image(model)
    selective = compiled(model, cache_ratio=0.0)
    torch.testing.assert_close(flux_image(selective), exact, **EXACT)
    assert counts(selective) == (STEPS, 0, 0, 0)

    specdiff.reset(selective)
    specdiff.configure(selective, cache_ratio=0.75)
    image = flux_image(selective)
    # measured: 0.04
    assert 1e-4 < apart(image, exact) < 0.12
    assert counts(selective) == (3, 7, 0, 1)
    found = specdiff.stats(selective)
    assert found.tokens_computed == (3 + 1) * TOKENS + 7 * ACTIVE
    assert found.tokens_total == STEPS * TOKENS
    assert found.fallbacks == {}
    assert (found.graphs, found.recompiles) == (1, 0)


def test_stable_diffusion_3_pipeline_with_guidance():
    model = sd3_5()
    exact = sd3_image(model)
    selective = compiled(model, cache_ratio=0.0)
    torch.testing.assert_close(sd3_image(selective), exact, **EXACT)

    specdiff.reset(selective)
    specdiff.configure(selective, cache_ratio=0.75, guidance_scale=7.0)
    image = sd3_image(selective)
    # measured: 0.05
    assert 1e-4 < apart(image, exact) < 0.15
    assert counts(selective) == (3, 7, 0, 1)
    found = specdiff.stats(selective)
    assert found.fallbacks == {}
    assert found.tokens_computed == 2 * ((3 + 1) * TOKENS + 7 * ACTIVE)
    assert torch.equal(*found.token_counts)


@pytest.mark.parametrize("make_image", [flux_image, sd3_image])
def test_default_options_are_close(make_image):
    model = flux()[0] if make_image is flux_image else sd3_5()
    exact = make_image(model)
    options = {"inner_backend": "eager"}
    if make_image is sd3_image:
        options["guidance_scale"] = 7.0
    selective = torch.compile(model, backend="specdiff", fullgraph=True, options=options)
    assert 1e-4 < apart(make_image(selective), exact) < 0.15
    found = specdiff.stats(selective)
    # by default whole steps are forecast, where 28 steps would leave out one at the same noise: of
    # ten steps one
    assert counts(selective) == (9, 0, 1, 0)
    assert found.evaluations == STEPS
    assert found.fallbacks == {}


def test_pipelines_one_after_the_other_start_afresh(model):
    selective = compiled(model)
    images = [flux_image(selective, seed) for seed in (0, 1, 0)]
    assert torch.equal(images[0], images[2])
    assert not torch.equal(images[0], images[1])
    assert counts(selective) == (9, 21, 0, 3)
    # two caches of an attention in each block; text and image, 32 channels, float32
    assert specdiff.stats(selective).cache_bytes == 2 * 2 * (TOKENS + 4) * 32 * 4
    torch.testing.assert_close(flux_image(compiled(copy.deepcopy(model)), 1), images[1], **EXACT)


def test_heun_scheduler():
    """In the SD3 pipeline: FluxPipeline hands sigmas over, which Heun's scheduler refuses."""
    model = sd3_5()

    def image(transformer: Any) -> Tensor:
        return sd3_image(transformer, scheduler=FlowMatchHeunDiscreteScheduler(shift=3.0), steps=6)

    evaluations = 2 * 6 - 1
    exact = image(model)
    selective = compiled(model, cache_ratio=0.0, guidance_scale=7.0)
    torch.testing.assert_close(image(selective), exact, **EXACT)
    assert counts(selective) == (evaluations, 0, 0, 0)
    specdiff.reset(selective)
    specdiff.configure(selective, cache_ratio=0.75)
    assert 1e-4 < apart(image(selective), exact) < 0.2
    assert counts(selective)[:3] == (3, evaluations - 3, 0)
    assert specdiff.stats(selective).fallbacks == {}


def test_bf16_times_that_collide(model):
    model = model.to(torch.bfloat16)
    times: list[float] = []

    def image(transformer: Any) -> Tensor:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=40.0)
        return flux_image(transformer, scheduler=scheduler, steps=20, dtype=torch.bfloat16)

    def observe(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        times.append(kwargs["timestep"].item())

    handle = model.register_forward_pre_hook(observe, with_kwargs=True)
    exact = image(model)
    handle.remove()
    assert len(times) == 20 > len(set(times))

    selective = compiled(model, cache_ratio=0.0)
    assert apart(image(selective), exact) < 0.02
    specdiff.reset(selective)
    specdiff.configure(selective, cache_ratio=0.75)
    assert apart(image(selective), exact) < 0.15
    assert counts(selective)[:3] == (3, 17, 0)
    assert specdiff.stats(selective).fallbacks == {}


# Generations that take turns ------------------------------------------------------------------


def test_two_prompts_interleaved(model):
    selective = compiled(model)
    runs = [Run(selective, seed) for seed in range(2)]
    for _ in range(STEPS):
        for run in runs:
            run.step()
    assert counts(selective) == (6, 14, 0, 2)
    for seed, run in enumerate(runs):
        run.assert_same(alone(model, seed))


def test_two_seeds_interleaved_on_one_prompt_tensor(model):
    selective = compiled(model)
    prompt = embeddings(0, text=4)
    runs = [Run(selective, seed, prompt=prompt) for seed in range(2)]
    # one pipeline call makes its position tables anew; a server's batcher keeps them
    runs[1].places, runs[1].text_places = runs[0].places, runs[0].text_places
    for _ in range(STEPS):
        for run in runs:
            run.step()
    for seed, run in enumerate(runs):
        run.assert_same(Run(compiled(model), seed, prompt=prompt).finish())
    assert specdiff.stats(selective).fallbacks == {}


def test_two_seeds_on_one_prompt_tensor_with_sessions(model):
    selective = compiled(model)
    prompt = embeddings(0, text=4)
    runs = [Run(selective, seed, prompt=prompt) for seed in range(2)]
    runs[1].places, runs[1].text_places = runs[0].places, runs[0].text_places
    sessions = [specdiff.session(selective) for _ in runs]
    for _ in range(STEPS):
        for run, session in zip(runs, sessions, strict=True):
            with session:
                run.step()
    assert counts(selective) == (6, 14, 0, 2)
    for seed, run in enumerate(runs):
        run.assert_same(alone(model, seed, prompt=prompt))


def test_two_models_take_turns_on_one_prompt_tensor(model):
    """Wan 2.2's two experts: one class, one prompt; Dynamo makes one callable for both."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    pair = [compiled(model), compiled(other)]
    prompt = embeddings(0, text=4)
    runs = [Run(each, 0, prompt=prompt) for each in pair]
    runs[1].places, runs[1].text_places = runs[0].places, runs[0].text_places
    for _ in range(STEPS):
        for run in runs:
            run.step()
    assert not torch.equal(runs[0].latent, runs[1].latent)
    for each, plain, run in zip(pair, (model, other), runs, strict=True):
        assert counts(each) == (3, 7, 0, 1)
        run.assert_same(alone(plain, prompt=prompt))


def test_two_models_one_after_the_other_in_one_generation(model):
    """The second half of the times goes to the second model, which starts with dense steps."""
    other = copy.deepcopy(model)
    first, second = compiled(model), compiled(other)
    run = Run(first).step(5)
    run.model = second
    run.finish()
    assert counts(first) == (3, 2, 0, 1)
    assert counts(second) == (3, 2, 0, 1)
    assert specdiff.stats(second).fallbacks == {}


# Times ------------------------------------------------------------------------------------------


class Rising(nn.Module):
    """Time runs from 0 to 1 and the output points to noise, as in Lumina2."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, timestep: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
        return (-self.inner(timestep=1 - timestep, **kwargs)[0],)


def test_rising_times(model):
    falling = alone(model)
    selective = compiled(Rising(copy.deepcopy(model)))

    def flipped(timestep: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
        return (-selective(timestep=1 - timestep, **kwargs)[0],)

    rising = Run(flipped).finish()
    assert counts(selective) == (3, 7, 0, 1)
    assert specdiff.stats(selective).fallbacks == {}
    torch.testing.assert_close(rising.velocities, falling.velocities, rtol=1e-3, atol=1e-4)


# Things that go wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_generation_after_an_aborted_one(model, stop):
    selective = compiled(model)
    prompt = embeddings(0, text=4)
    aborted = Run(selective, 0, prompt=prompt).step(stop)
    run = Run(selective, 1, prompt=prompt)
    run.places, run.text_places = aborted.places, aborted.text_places
    run.finish().assert_same(alone(model, 1, prompt=prompt))
    assert specdiff.stats(selective).fallbacks == {}


def test_nan_latent(model):
    selective = compiled(model)
    run = Run(selective).step(5)
    run.latent = run.latent.clone()
    run.latent[0, 3, 2] = float("nan")
    run.step()
    with torch.no_grad():
        exact = model(**run.inputs[-1])[0]
    assert exact.isnan().any()
    torch.testing.assert_close(run.velocities[-1], exact, equal_nan=True, **EXACT)
    assert specdiff.stats(selective).fallbacks == {"latent is not finite": 1}
    again = Run(selective, prompt=run.prompt)
    again.places, again.text_places = run.places, run.text_places
    again.finish().assert_same(alone(model))


def test_other_resolution_in_mid_run(model):
    """With dynamic=False another shape is another graph with streams of its own."""
    selective = compiled(model)
    prompt = embeddings(0, text=4)
    first = Run(selective, 0, prompt=prompt).step(5)
    other = Run(selective, 1, prompt=prompt, rows=3, columns=5).finish()
    first.finish()
    assert specdiff.stats(selective).graphs == 2
    assert specdiff.stats(selective).fallbacks == {}
    assert counts(selective) == (6, 14, 0, 2)
    first.assert_same(alone(model, 0, prompt=prompt))
    other.assert_same(alone(model, 1, prompt=prompt, rows=3, columns=5))


@pytest.mark.slow
def test_other_resolution_in_mid_run_under_automatic_dynamic_shapes(model):
    """Dynamo makes the second graph symbolic, and from then on it answers the first shape, too."""
    selective = compiled(model, dynamic=None)
    prompt = embeddings(0, text=4)
    first = Run(selective, 0, prompt=prompt).step(5)
    other = Run(selective, 1, prompt=prompt, rows=3, columns=5).finish()
    assert counts(selective) == (6, 9, 0, 2)
    other.assert_same(alone(model, 1, prompt=prompt, rows=3, columns=5))
    # the stream of the first graph is not that of the second: the generation starts anew
    first.finish()
    assert specdiff.stats(selective).fallbacks == {}
    third = Run(selective, 2, prompt=embeddings(2, text=4)).finish()
    third.assert_same(alone(model, 2, prompt=embeddings(2, text=4)))


@pytest.mark.slow
def test_one_symbolic_graph_answers_every_resolution(model):
    """dynamic=True: Dynamo stops compiling, every shape has a runtime, all of them are right."""
    selective = compiled(model, dynamic=True)
    for seed, (rows, columns) in enumerate([(4, 5), (3, 5), (5, 4), (4, 6)]):
        prompt = embeddings(seed, text=4)
        run = Run(selective, seed, prompt=prompt, rows=rows, columns=columns).finish()
        run.assert_same(alone(model, seed, prompt=prompt, rows=rows, columns=columns))
    with torch.compiler.set_stance("fail_on_recompile"):
        Run(selective, 9, prompt=embeddings(9, text=4), rows=6, columns=3).finish()
    found = specdiff.stats(selective)
    assert (found.selective, found.fallbacks) == (35, {})


@pytest.mark.slow
def test_tokens_marked_dynamic(model):
    """Symbolic from the first call on, by the user's own word; no later shape is compiled for."""
    selective = compiled(model, dynamic=None)
    first = Run(selective, 0)
    for value in (first.latent, first.places):
        torch._dynamo.mark_dynamic(value, value.dim() - 2)
    first.finish().assert_same(alone(model, 0))
    with torch.compiler.set_stance("fail_on_recompile"):
        other = Run(selective, 1, rows=3, columns=7).finish()
    other.assert_same(alone(model, 1, rows=3, columns=7))
    assert specdiff.stats(selective).fallbacks == {}


def test_symbolic_batch():
    model, inputs = flux(batch=2)
    _, more = flux(batch=3)
    selective = torch.compile(
        model, backend=specdiff.backend(inner_backend="eager"), fullgraph=True, dynamic=True
    )
    with torch.no_grad():
        for call in (inputs, more, inputs):
            torch.testing.assert_close(selective(**call), model(**call), **EXACT)
    assert specdiff.stats(selective).graphs == 2


def test_pipeline_at_a_second_resolution(model):
    selective = compiled(model)
    first = flux_image(selective)
    other = flux_image(selective, rows=5, columns=3)
    assert 1e-4 < apart(other, flux_image(model, rows=5, columns=3)) < 0.15
    torch.testing.assert_close(flux_image(selective), first, **EXACT)
    assert counts(selective) == (9, 21, 0, 3)


class CutGuidance(PipelineCallback):
    """Guidance ends after some steps: the batch becomes one, as diffusers' own callback has it."""

    tensor_inputs: ClassVar = ["prompt_embeds", "pooled_prompt_embeds"]

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def callback_fn(self, pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> Any:
        if step == self.after:
            tensors = {name: value[-1:] for name, value in tensors.items()}
            pipe._guidance_scale = 0.0
        return tensors


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
def test_guidance_that_ends_needs_two_graphs(dynamic):
    """The time is a view into all times, whose place Dynamo makes an input of the second graph."""
    model = sd3(layers=2)[0]
    selective = compiled(model, dynamic=dynamic)
    for _ in range(2):
        sd3_image(selective, steps=20, callback_on_step_end=CutGuidance(8))
    found = specdiff.stats(selective)
    assert (found.graphs, found.fallbacks) == (2, {CONTINUED: 2 * 2})
    # three to begin with, and two where the generation goes on in the other graph
    assert (found.dense, found.selective) == (2 * 5, 2 * 15)
