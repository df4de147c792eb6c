"""The workflows of `workflows.py`: how each of them draws a picture with the demo model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.callbacks import SD3CFGCutoffCallback
from torch import Tensor, nn
from workflow_drawing import SIDE, Drawing, base, euler, flux, scheduler, times_of
from workflow_loops import (
    anew,
    by_hand,
    cut_off,
    flow_edit,
    of_noise,
    tiles,
    toggled,
    two_experts,
)

from specdiff.models import demo, textures

BOTH = ("attached", "attached, scheduler")
TEXTURES = Path(__file__).parents[1] / "training/textures/textures.safetensors"
SESSIONS = (*BOTH, "session", "session, timesteps", "session, scheduler")
FLOW: Mapping[str, Any] = {
    "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": demo.TIME_SHIFT,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A workflow."""

    name: str
    load: Callable[[], Drawing]
    steps: int = 28
    ways: Sequence[str] = BOTH


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
                flux(pipe, steps, prompt, seed + 100, callback_on_step_end=_interrupt, **more)
            return flux(pipe, steps, prompt, seed, callback_on_step_end=callback, **more)

        return Drawing(pipe.transformer, pipe.scheduler, draw, lambda n: times_of(pipe, n))

    return load


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
    generator = torch.Generator().manual_seed(torch.initial_seed())  # that of `flux`
    noise = torch.randn(1, 12, side, side, generator=generator)
    noise = pipe._pack_latents(noise, 1, 12, side, side)
    picture = demo.pack(base() * 2 - 1)
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
        found = SimpleNamespace(sample=lambda generator: latents, mode=lambda: latents)
        return SimpleNamespace(latent_dist=found)

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


def from_image(
    kind: str, name: str, masked: bool = False, control: bool = False, **more: Any
) -> Callable[[], Drawing]:
    """A pipeline of diffusers that is given a picture, by the argument `name`, and `more`."""

    def load() -> Drawing:
        pipe = _image_pipeline(kind, **({"controlnet": _controlnet()} if control else {}))
        arguments: dict[str, Any] = {name: base(), **more}
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

        return Drawing(pipe.transformer, pipe.scheduler, draw, lambda n: times_of(pipe, n))

    return load


def guided_in_a_batch(**more: Any) -> Callable[[], Drawing]:
    """Diffusers' Stable Diffusion 3 pipeline, with the model of textures."""

    def load() -> Drawing:
        pipe: Any = textures.wrap_pipeline(textures.load_transformer(TEXTURES))
        pipe.set_progress_bar_config(disable=True)

        def draw(steps: int, prompt: str, seed: int) -> Tensor:
            tokens, pooled = textures.class_codes([textures.CLASSES[seed]])
            latents = pipe(
                prompt_embeds=tokens, pooled_prompt_embeds=pooled,
                negative_prompt_embeds=torch.zeros_like(tokens),
                negative_pooled_prompt_embeds=torch.zeros_like(pooled),
                guidance_scale=textures.GUIDANCE_SCALE, num_inference_steps=steps,
                height=textures.PIPELINE_SIDE, width=textures.PIPELINE_SIDE,
                generator=torch.Generator().manual_seed(seed), output_type="latent", **more,
            ).images  # fmt: skip
            return textures.to_pixels(latents)

        return Drawing(pipe.transformer, pipe.scheduler, draw, lambda n: times_of(pipe, n))

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
    Kind("image to image, 60 %", from_image("FluxImg2ImgPipeline", "image", strength=0.6)),
    Kind("inpainting", from_image("FluxInpaintPipeline", "image", masked=True, strength=0.8)),
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
    Kind("image to image, 25 %", from_image("FluxImg2ImgPipeline", "image", strength=0.25)),
    *(
        Kind(f"{name}, sessions", text_to_image(make), ways=SESSIONS[2:])
        for name, make in {"UniPC": MULTISTEP["UniPC"], **NOISY}.items()
    ),
    Kind("inpainting by a callback", text_to_image(callback=paint)),
    Kind("FlowEdit, by hand", flow_edit),
    *(Kind(name, of_noise(f"{name}Scheduler")) for name in ("DDIM", "DDPM")),
    Kind("Euler, bfloat16", text_to_image(dtype=torch.bfloat16), ways=SESSIONS),
    Kind("DPM++ 2M, bfloat16", text_to_image(MULTISTEP["DPM++ 2M"], dtype=torch.bfloat16)),
    Kind(
        "Kontext",
        from_image("FluxKontextPipeline", "image", max_area=SIDE**2, _auto_resize=False),
    ),
    Kind("skip-layer guidance, SD3", guided_in_a_batch(skip_guidance_layers=[2, 3])),
    Kind(
        "guidance cut off at 60 %, SD3",
        guided_in_a_batch(callback_on_step_end=SD3CFGCutoffCallback(cutoff_step_ratio=0.6)),
    ),
    Kind("two experts, by hand", two_experts),
    Kind("guidance at every other step, by hand", by_hand(toggled)),
    *(Kind(f"{name}, 20 steps", text_to_image(make), 20) for name, make in MULTISTEP.items()),
    *(Kind(f"{name}, 50 steps", text_to_image(make), 50) for name, make in SPACED.items()),
)
