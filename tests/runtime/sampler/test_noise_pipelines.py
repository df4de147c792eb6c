"""diffusers' pipelines of models that predict noise or v, under their own schedulers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HunyuanDiTPipeline,
    PixArtAlphaPipeline,
)
from torch import Tensor, nn

import specdiff
from specdiff.plan import Plan
from specdiff.runtime.sampler.noise import Diffusion, usual_tables
from specdiff.runtime.sampler.sampler_fit import Prediction
from specdiff.runtime.step import lookahead
from tests.models.image import dit_transformer, hunyuan_dit, pixart_transformer
from tests.test_pipelines import apart, compiled, counts

STEPS = 20
DENSE = (0, 1, 2, 5, 8, 11, 14, 17)
PLAN = {
    "cache_ratio": 0.5,
    "method": "history",
    "plan": Plan.every(3, warmup=3),
}
LINEAR = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
HUNYUAN = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.03,
    "prediction_type": "v_prediction",
}


class Recorder(nn.Module):
    """Hands every call on to a transformer and keeps it with its answer."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.inner = transformer
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.answers: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        answer = self.inner(*args, **kwargs)
        self.calls.append((args, kwargs))
        self.answers.append(answer[0])
        return answer


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=1, latent_channels=4).eval()


def dit_image(transformer: Any, scheduler: Any, steps: int = STEPS) -> Tensor:
    """One image of class 3; the conditional half of the batch comes first."""
    pipe = DiTPipeline(transformer=transformer, vae=tiny_vae(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(
        [3], guidance_scale=4.0, generator=generator, num_inference_steps=steps, output_type="pt"
    ).images


def prompt(seed: int, length: int, channels: int) -> Tensor:
    return torch.randn(1, length, channels, generator=torch.Generator().manual_seed(seed))


def pixart_image(transformer: Any, scheduler: Any, steps: int = STEPS) -> Tensor:
    pipe = PixArtAlphaPipeline(
        transformer=transformer, scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        negative_prompt=None,
        prompt_embeds=prompt(0, 5, 20),
        prompt_attention_mask=torch.tensor([[1, 1, 1, 1, 0]]),
        negative_prompt_embeds=prompt(1, 5, 20),
        negative_prompt_attention_mask=torch.tensor([[1, 1, 0, 0, 0]]),
        height=96,
        width=112,
        use_resolution_binning=False,
        num_inference_steps=steps,
        guidance_scale=4.5,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images


def hunyuan_image(transformer: Any, scheduler: Any, steps: int = STEPS) -> Tensor:
    pipe = HunyuanDiTPipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    embeddings: dict[str, Tensor] = {}
    for tail, length, channels in (("", 5, 20), ("_2", 6, 24)):
        for seed, head in enumerate(("", "negative_")):
            embeddings[f"{head}prompt_embeds{tail}"] = prompt(seed, length, channels)
            mask = torch.ones(1, length, dtype=torch.int64)
            embeddings[f"{head}prompt_attention_mask{tail}"] = mask
    return pipe(
        **embeddings,
        height=96,
        width=112,
        use_resolution_binning=False,
        num_inference_steps=steps,
        guidance_scale=5.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images


def dit() -> nn.Module:
    return dit_transformer(classes=1000).model  # the pipeline takes 1000 for no class


def pixart() -> nn.Module:
    return pixart_transformer(sample_size=128).model  # the size that asks for resolutions


def hunyuan() -> nn.Module:
    return hunyuan_dit(layers=4).model


Make = tuple[Callable[[], nn.Module], Callable[..., Tensor], Callable[[], Any], float]
RUNS: dict[str, tuple[Make, tuple[str, int, bool, int]]] = {
    "dit-ddim": (
        (dit, dit_image, lambda: DDIMScheduler(clip_sample=False, **LINEAR), 4.0),
        ("epsilon", 0, False, 1),
    ),
    "dit-dpm": (
        (dit, dit_image, lambda: DPMSolverMultistepScheduler(**LINEAR), 4.0),
        ("epsilon", 0, False, 1),
    ),
    "pixart-dpm": (
        (pixart, pixart_image, lambda: DPMSolverMultistepScheduler(**LINEAR), 4.5),
        ("epsilon", 0, False, 0),
    ),
    "pixart-euler": (
        (pixart, pixart_image, lambda: EulerDiscreteScheduler(**LINEAR), 4.5),
        ("epsilon", 0, False, 0),
    ),
    "hunyuan-ddim": (
        (hunyuan, hunyuan_image, lambda: DDIMScheduler(clip_sample=False, **HUNYUAN), 5.0),
        ("v", 2, False, 0),
    ),
    "hunyuan-ddpm": (
        (hunyuan, hunyuan_image, lambda: DDPMScheduler(clip_sample=False, **HUNYUAN), 5.0),
        ("v", 2, True, 0),
    ),
}
"""How to run, and what the runtime should find: the kind, the schedule, whether noise is added, and
the half of the batch that is not conditional."""

QUICK = ("dit-ddim", "dit-dpm", "pixart-euler", "hunyuan-ddpm")


@pytest.fixture
def inferred(monkeypatch: pytest.MonkeyPatch) -> list[Prediction]:
    """What the runtime takes the sampler of each generation to be."""
    found: list[Prediction] = []
    infer = lookahead._inferred

    def note(*args: Any) -> Prediction:
        found.append(infer(*args))
        return found[-1]

    monkeypatch.setattr(lookahead, "_inferred", note)
    return found


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNS],
)
def test_pipeline(name, inferred):
    (make, image, scheduler, scale), (kind, schedule, ancestral, way) = RUNS[name]
    model = make()
    plain, fast = Recorder(model), Recorder(compiled(model, **PLAN, guidance_scale=scale))
    exact, result = image(plain, scheduler()), image(fast, scheduler())
    assert counts(fast.inner) == (len(DENSE), STEPS - len(DENSE), 0, 1)
    assert specdiff.stats(fast.inner).fallbacks == {}
    # measured: 0.002 to 0.02, with DDPM 0.09
    assert 1e-4 < apart(result, exact) < 0.2

    torch.testing.assert_close(fast.answers[:3], plain.answers[:3], rtol=1e-3, atol=1e-4)
    for index in DENSE:
        args, kwargs = fast.calls[index]
        with torch.no_grad():
            expected = model(*args, **kwargs)[0]
        torch.testing.assert_close(fast.answers[index], expected, rtol=1e-3, atol=1e-4)

    (prediction,) = inferred
    row, found = divmod(int(prediction.best), 2)
    expected_process = Diffusion(kind, usual_tables()[schedule], ancestral)
    assert (prediction.candidates[row], found) == (expected_process, way)


def test_pipeline_in_a_session_that_gives_the_times():
    model, scheduler = pixart(), DPMSolverMultistepScheduler(**LINEAR)
    scheduler.set_timesteps(STEPS)
    fast = compiled(model, **PLAN, guidance_scale=4.5, prediction="epsilon")
    with specdiff.session(fast, scheduler.timesteps, alphas_cumprod=scheduler.alphas_cumprod):
        result = pixart_image(fast, scheduler)
    assert 1e-4 < apart(result, pixart_image(model, scheduler)) < 0.1
    assert counts(fast) == (len(DENSE), STEPS - len(DENSE), 0, 1)


def test_what_no_candidate_explains_is_said_once(caplog):
    """Without guidance_scale nothing fits; the run goes on without a look-ahead."""
    model, scheduler = pixart(), DPMSolverMultistepScheduler(**LINEAR)
    fast = compiled(model, **PLAN, prediction="v")
    with caplog.at_level("WARNING", logger="specdiff"):
        pixart_image(fast, scheduler, steps=50)
    assert specdiff.stats(fast).speculative == 0
    assert [m for m in caplog.messages if m.startswith("no speculation")] == caplog.messages[:1]


class Noise(nn.Module):
    """The noise in [1, 64, 16] of a picture that bends with what is seen and with time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Linear(16, 16)
        self.kept = DDIMScheduler(**LINEAR).alphas_cumprod

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        signal, noise = self.kept[timestep].sqrt(), (1 - self.kept[timestep]).sqrt()
        picture = torch.tanh(self.mix(sample) + condition + torch.sin(2 * noise))
        return (sample - signal * picture) / noise


@torch.no_grad()
def noise_image(model: nn.Module, scheduler: Any, steps: int = 28) -> Tensor:
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(1)
    latent, condition = torch.randn(2, 1, 64, 16, generator=generator)
    for time in scheduler.timesteps:
        found = model(latent, time, condition)
        latent = scheduler.step(found, time, latent, generator=generator).prev_sample
    return latent


def test_no_whole_step_is_forecast_through_noise_of_a_known_size():
    """Tokens that are selected see the noise; a forecast of a whole prediction does not."""
    model = Noise()
    exact = noise_image(model, DDPMScheduler(clip_sample=False, **LINEAR))
    specdiff.attach(model)
    assert torch.equal(noise_image(model, DDPMScheduler(clip_sample=False, **LINEAR)), exact)
    assert specdiff.stats(model).fallbacks["unexplained step"] > 14


def test_steps_of_ddim_are_known_to_be_of_first_order(caplog):
    """They are small beside the two terms that they are the difference of."""
    model = Noise()
    specdiff.attach(model)
    noise_image(model, DDIMScheduler(clip_sample=False, **LINEAR))
    assert specdiff.stats(model).skipped and not caplog.messages
