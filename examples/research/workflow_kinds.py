"""The workflows of `workflows.py`: how each of them draws a picture with the demo model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from specdiff.models import demo

BOTH = ("attached", "attached, scheduler")
SESSIONS = (*BOTH, "session", "session, timesteps", "session, scheduler")
SIDE = 128
FLOW: Mapping[str, Any] = {
    "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": demo.TIME_SHIFT,
}  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """One workflow, loaded."""

    model: nn.Module
    scheduler: Any
    draw: Callable[[int, str, int], Tensor]
    """A picture [1, 3, height, width] of so many steps, a prompt, a seed."""
    times: Callable[[int], Tensor]
    """What the scheduler's timesteps will be."""


@dataclass(frozen=True)
class Kind:
    """A workflow."""

    name: str
    load: Callable[[], Drawing]
    steps: int = 28
    ways: Sequence[str] = BOTH


def scheduler(name: str, **options: Any) -> Callable[[], Any]:
    """A scheduler of diffusers, which pipelines that hand sigmas over can use."""

    def make() -> Any:
        kind = getattr(diffusers, name)
        if "sigmas" in inspect.signature(kind.set_timesteps).parameters:
            return kind(**options)

        class Counted(kind):  # type: ignore[misc, valid-type]
            def set_timesteps(
                self, count: Any = None, device: Any = None, sigmas: Any = None, mu: Any = None
            ) -> None:
                super().set_timesteps(count or len(sigmas), device=device)

        return Counted(**options)

    return make


def euler(**options: Any) -> Callable[[], Any]:
    """Euler on the demo model's flow."""
    return scheduler("FlowMatchEulerDiscreteScheduler", shift=demo.TIME_SHIFT, **options)


def text_to_image(
    steps_with: Callable[[], Any] | None = None,
    callback: Callable[..., dict[str, Any]] | None = None,
    negative: str = "",
    interrupted: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Callable[[], Drawing]:
    """Diffusers' FLUX pipeline.

    Args:
        steps_with: makes its scheduler; None: Euler.
        callback: on each step's end.
        negative: a prompt, for guidance in calls of its own.
        interrupted: whether each picture begins after another that was cut short.
        dtype: of the model and its latents.
    """

    def load() -> Drawing:
        pipe: Any = demo.load_pipeline().to(dtype)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = (steps_with or euler())()

        def draw(steps: int, prompt: str, seed: int) -> Tensor:
            more: dict[str, Any] = {}
            if negative:
                tokens, pooled = demo.prompt_embeddings([negative])
                more = {
                    "negative_prompt_embeds": tokens, "negative_pooled_prompt_embeds": pooled,
                    "true_cfg_scale": 2.0,
                }  # fmt: skip
            if interrupted:
                _flux(pipe, steps, prompt, seed + 100, callback_on_step_end=_interrupt, **more)
            return _flux(pipe, steps, prompt, seed, callback_on_step_end=callback, **more)

        return Drawing(pipe.transformer, pipe.scheduler, draw, lambda n: _times(pipe, n))

    return load


def _flux(pipe: Any, steps: int, prompt: str, seed: int, **more: Any) -> Tensor:
    tokens, pooled = (each.to(pipe.dtype) for each in demo.prompt_embeddings([prompt]))
    torch.manual_seed(seed)  # some schedulers draw from the global generator
    latents = pipe(
        prompt_embeds=tokens, pooled_prompt_embeds=pooled, num_inference_steps=steps,
        height=demo.PIPELINE_SIDE, width=demo.PIPELINE_SIDE, output_type="latent",
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"], **more,
    ).images  # fmt: skip
    return demo.to_pixels(latents.float())


def _times(pipe: Any, steps: int) -> Tensor:
    import numpy

    sigmas = numpy.linspace(1.0, 1 / steps, steps)
    of_flow = pipe.scheduler.config.get("use_flow_sigmas", False)
    pipe.scheduler.set_timesteps(steps) if of_flow else pipe.scheduler.set_timesteps(sigmas=sigmas)
    times: Tensor = pipe.scheduler.timesteps
    return times


def _interrupt(pipe: Any, step: int, time: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = step >= 8
    return given


def travel(pipe: Any, step: int, time: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """The prompt moves to another one."""
    there, _ = demo.prompt_embeddings(["cactus"])
    share = 0.02
    return {**given, "prompt_embeds": torch.lerp(given["prompt_embeds"], there, share)}


def swap(pipe: Any, step: int, time: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """Another prompt from half-way on."""
    if step == pipe.num_timesteps // 2:
        given = {**given, "prompt_embeds": demo.prompt_embeddings(["cactus"])[0]}
    return given


def paint(pipe: Any, step: int, time: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """The upper half of the latent stays that of a picture, with the noise of its beginning."""
    sigma, side = pipe.scheduler.sigmas[pipe.scheduler.step_index], SIDE // 2
    generator = torch.Generator().manual_seed(torch.initial_seed())  # that of `_flux`
    noise = torch.randn(1, 12, side, side, generator=generator)
    noise = pipe._pack_latents(noise, 1, 12, side, side)
    picture = demo.pack(_base() * 2 - 1)
    half = picture.shape[1] // 2
    kept = (sigma * noise + (1 - sigma) * picture)[:, :half].to(given["latents"].dtype)
    return {**given, "latents": torch.cat([kept, given["latents"][:, half:]], dim=1)}


class PixelVAE(nn.Module):
    """Stands in for FLUX's VAE: pixels, laid out so that packing gives the demo's tokens."""

    config = SimpleNamespace(
        block_out_channels=(1, 1), latent_channels=12, scaling_factor=1.0, shift_factor=0.0
    )
    dtype, device = torch.float32, torch.device("cpu")

    def encode(self, pictures: Tensor) -> Any:
        """[B, 3, H, W] to [B, 12, H / 2, W / 2]."""
        batch, _, height, width = pictures.shape
        rows, columns = height // 4, width // 4
        grid = demo.pack(pictures).view(batch, rows, columns, 12, 2, 2).permute(0, 3, 1, 4, 2, 5)
        latents = grid.reshape(batch, 12, 2 * rows, 2 * columns)
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda generator: latents))

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Back."""
        batch, _, height, width = latents.shape
        grid = latents.view(batch, 12, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        patches = grid.reshape(batch, height // 2, width // 2, 3, 4, 4).permute(0, 3, 1, 4, 2, 5)
        return (patches.reshape(batch, 3, 2 * height, 2 * width),)


def _image_pipeline(kind: str, **more: Any) -> Any:
    pipe = getattr(diffusers, kind)(
        scheduler=euler()(), vae=PixelVAE(), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=demo.load_transformer(), **more,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def _base() -> Tensor:
    pipe = demo.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return _flux(pipe, 10, "watermelon", 3)


def from_image(
    kind: str, name: str, strength: float = 0.0, masked: bool = False, control: bool = False
) -> Callable[[], Drawing]:
    """A pipeline of diffusers that is given a picture, by the argument `name`."""

    def load() -> Drawing:
        pipe = _image_pipeline(kind, **({"controlnet": _controlnet()} if control else {}))
        arguments: dict[str, Any] = {name: _base()}
        if strength:
            arguments["strength"] = strength
        if masked:
            mask = torch.zeros(1, 1, SIDE, SIDE)
            mask[..., : SIDE // 2] = 1
            arguments["mask_image"] = mask

        def draw(steps: int, prompt: str, seed: int) -> Tensor:
            tokens, pooled = demo.prompt_embeddings([prompt])
            with torch.no_grad():
                pictures: Tensor = pipe(
                    prompt_embeds=tokens, pooled_prompt_embeds=pooled, height=SIDE, width=SIDE,
                    num_inference_steps=steps, generator=torch.Generator().manual_seed(seed),
                    output_type="pt", **arguments,
                ).images  # fmt: skip
            return pictures.float()

        return Drawing(pipe.transformer, pipe.scheduler, draw, lambda n: _times(pipe, n))

    return load


def _controlnet() -> nn.Module:
    torch.manual_seed(0)
    net = diffusers.FluxControlNetModel.from_transformer(
        demo.load_transformer(), num_layers=2, num_single_layers=4, attention_head_dim=64,
        num_attention_heads=4,
    )  # fmt: skip
    with torch.no_grad():
        for part in (
            net.controlnet_blocks,
            net.controlnet_single_blocks,
            net.controlnet_x_embedder,
        ):
            for parameter in part.parameters():
                parameter.normal_(0, 0.01)
    return net.eval()


Velocity = Callable[[Tensor, Tensor, float], Tensor]
"""(latent [1, 32, width, 48], time, share of the steps done) to the velocity."""


def by_hand(make: Callable[[nn.Module, str], Velocity], width: int = 32) -> Callable[[], Drawing]:
    """A loop of the user's own around the model and a scheduler."""

    def load() -> Drawing:
        model, steps_with = demo.load_transformer(), euler()()

        @torch.no_grad()
        def draw(steps: int, prompt: str, seed: int) -> Tensor:
            velocity = make(model, prompt)
            steps_with.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).numpy())
            latent = torch.randn(1, 32, width, 48, generator=torch.Generator().manual_seed(seed))
            for index, time in enumerate(steps_with.timesteps):
                found = velocity(latent, time, index / steps)
                latent = steps_with.step(found, time, latent, return_dict=False)[0]
            return (latent / 2 + 0.5).clamp(0, 1)

        return Drawing(model, steps_with, draw, lambda n: torch.empty(0))

    return load


def _call(model: nn.Module, latent: Tensor, time: Tensor, prompt: tuple[Tensor, Tensor]) -> Tensor:
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(32.0), torch.arange(32.0))
    found = model(
        hidden_states=latent.reshape(-1, 1024, 48), timestep=time.reshape(1) / 1000,
        encoder_hidden_states=prompt[0], pooled_projections=prompt[1], img_ids=ids,
        txt_ids=torch.zeros(demo.TEXT_TOKENS, 3), return_dict=False,
    )[0]  # fmt: skip
    return found.reshape(-1, 32, 32, 48)


def tiles(model: nn.Module, prompt: str) -> Velocity:
    """Two windows of one latent, half overlapping."""
    given = demo.prompt_embeddings([prompt])

    def velocity(latent: Tensor, time: Tensor, done: float) -> Tensor:
        total, count = torch.zeros_like(latent), torch.zeros(1, 1, latent.shape[2], 1)
        for left in (0, 16):
            part = slice(left, left + 32)
            total[:, :, part] += _call(model, latent[:, :, part], time, given)
            count[:, :, part] += 1
        return total / count

    return velocity


def anew(model: nn.Module, prompt: str) -> Velocity:
    """Prompt tensors made anew at each step, as ComfyUI makes them."""
    given = demo.prompt_embeddings([prompt])

    def velocity(latent: Tensor, time: Tensor, done: float) -> Tensor:
        return _call(model, latent, time, (torch.cat([given[0]]), torch.cat([given[1]])))

    return velocity


def cut_off(model: nn.Module, prompt: str) -> Velocity:
    """Guidance in calls of its own, for the first 60 % of the steps."""
    given, against = demo.prompt_embeddings([prompt]), demo.prompt_embeddings(["cactus"])

    def velocity(latent: Tensor, time: Tensor, done: float) -> Tensor:
        found = _call(model, latent, time, given)
        if done >= 0.6:
            return found
        return torch.lerp(_call(model, latent, time, against), found, 2.0)

    return velocity


def flow_edit() -> Drawing:
    """FlowEdit: a picture moved by how two prompts' velocities differ; noise anew each step."""
    model = demo.load_transformer()

    @torch.no_grad()
    def draw(steps: int, prompt: str, seed: int) -> Tensor:
        source, target = demo.prompt_embeddings(["watermelon"]), demo.prompt_embeddings([prompt])
        generator = torch.Generator().manual_seed(seed)
        even = torch.linspace(1, 0, steps + 1)
        sigmas = demo.TIME_SHIFT * even / (1 + (demo.TIME_SHIFT - 1) * even)
        start = demo.pack(_base() * 2 - 1).reshape(1, 32, 32, 48)
        latent = start
        for now, then in pairwise(sigmas[steps // 7 :]):
            noised = (1 - now) * start + now * torch.randn(start.shape, generator=generator)
            moved = latent + noised - start
            apart = _call(model, moved, 1000 * now, target) - _call(
                model, noised, 1000 * now, source
            )
            latent = latent + (then - now) * apart
        return (latent / 2 + 0.5).clamp(0, 1)

    return Drawing(model, euler()(), draw, lambda n: torch.empty(0))


class Noise(nn.Module):
    """The demo model as one that predicts noise, on the usual noise schedule: the same pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = demo.load_transformer()
        self.kept = diffusers.DDIMScheduler().alphas_cumprod

    def forward(self, sample: Tensor, timestep: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
        """The noise [1, 32, 32, 48] in a sample of that shape."""
        signal, noise = self.kept[timestep].sqrt(), (1 - self.kept[timestep]).sqrt()
        latent, sigma = sample / (signal + noise), noise / (signal + noise)
        return latent + (1 - sigma) * _call(self.flow, latent, 1000 * sigma, (tokens, pooled))


def of_noise(name: str) -> Callable[[], Drawing]:
    """A loop around a model that predicts noise."""

    def load() -> Drawing:
        model = Noise()
        steps_with = getattr(diffusers, name)(clip_sample=False)

        @torch.no_grad()
        def draw(steps: int, prompt: str, seed: int) -> Tensor:
            given = demo.prompt_embeddings([prompt])
            steps_with.set_timesteps(steps)
            generator = torch.Generator().manual_seed(seed)
            latent = torch.randn(1, 32, 32, 48, generator=generator)
            for time in steps_with.timesteps:
                found = model(latent, time, *given)
                latent = steps_with.step(found, time, latent, generator=generator).prev_sample
            return (latent / 2 + 0.5).clamp(0, 1)

        return Drawing(model, steps_with, draw, lambda n: torch.empty(0))

    return load


MULTISTEP = {
    "DPM++ 2M": scheduler("DPMSolverMultistepScheduler", **FLOW),
    "UniPC": scheduler("UniPCMultistepScheduler", **FLOW),
    "DPM++ 3M": scheduler("DPMSolverMultistepScheduler", solver_order=3, **FLOW),
    "UniPC 3": scheduler("UniPCMultistepScheduler", solver_order=3, **FLOW),
    "DEIS": scheduler("DEISMultistepScheduler", **FLOW),
    "DPM++ 2S": scheduler("DPMSolverSinglestepScheduler", **FLOW),
    "Heun": scheduler("FlowMatchHeunDiscreteScheduler", shift=demo.TIME_SHIFT),
}
SPACED = {
    "Karras": euler(use_karras_sigmas=True),
    "exponential": euler(use_exponential_sigmas=True),
    "beta": euler(use_beta_sigmas=True),
    "dynamic shift": scheduler("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True),
}
NOISY = {
    "Euler stochastic": euler(stochastic_sampling=True),
    "LCM": scheduler("FlowMatchLCMScheduler", shift=demo.TIME_SHIFT),
    "DPM++ 2M SDE": scheduler(
        "DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", **FLOW
    ),
    "SA-Solver": scheduler("SASolverScheduler", **FLOW),
}
KINDS = (
    *(Kind(name, text_to_image(make)) for name, make in MULTISTEP.items()),
    *(Kind(name, text_to_image(make)) for name, make in SPACED.items()),
    *(Kind(name, text_to_image(make)) for name, make in NOISY.items()),
    Kind("image to image, 60 %", from_image("FluxImg2ImgPipeline", "image", 0.6)),
    Kind("inpainting", from_image("FluxInpaintPipeline", "image", 0.8, masked=True)),
    Kind("ControlNet", from_image("FluxControlNetPipeline", "control_image", control=True)),
    Kind("true CFG", text_to_image(negative="cactus")),
    Kind("guidance cut off at 60 %, by hand", by_hand(cut_off)),
    Kind("tiles, by hand", by_hand(tiles, 48)),
    Kind("conditions anew, by hand", by_hand(anew)),
    Kind("prompt travels", text_to_image(callback=travel)),
    Kind("prompt swapped half-way", text_to_image(callback=swap)),
    Kind("interrupted, then another", text_to_image(interrupted=True)),
    Kind("Euler", text_to_image(), ways=SESSIONS),
    *(Kind(f"Euler, {n} steps", text_to_image(), n) for n in (4, 8, 20, 50)),
    Kind("image to image, 25 %", from_image("FluxImg2ImgPipeline", "image", 0.25)),
    *(
        Kind(f"{name}, sessions", text_to_image(make), ways=SESSIONS[2:])
        for name, make in {"UniPC": MULTISTEP["UniPC"], **NOISY}.items()
    ),
    Kind("inpainting by a callback", text_to_image(callback=paint)),
    Kind("FlowEdit, by hand", flow_edit),
    *(Kind(name, of_noise(f"{name}Scheduler")) for name in ("DDIM", "DDPM")),
    Kind("Euler, bfloat16", text_to_image(dtype=torch.bfloat16), ways=SESSIONS),
    Kind("DPM++ 2M, bfloat16", text_to_image(MULTISTEP["DPM++ 2M"], dtype=torch.bfloat16)),
    *(Kind(f"{name}, 20 steps", text_to_image(make), 20) for name, make in MULTISTEP.items()),
    *(Kind(f"{name}, 50 steps", text_to_image(make), 50) for name, make in SPACED.items()),
)
