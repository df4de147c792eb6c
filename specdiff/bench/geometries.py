"""Geometries: transformers of known sizes with random weights, and their sampling loops.

For measuring speed, which needs no trained weights. The loop is that of the diffusers pipelines:
`FlowMatchEulerDiscreteScheduler`, one prompt tensor for the whole run, both halves of
classifier-free guidance in one batch where the model has no guidance of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from specdiff.errors import SpecdiffError

SHIFT = 3.0
"""Of the sampling times towards noise, as both families have it at these sizes."""
GUIDANCE = {"flux": 3.5, "sd3": 7.0}


@dataclass(frozen=True)
class Geometry:
    """The sizes of one model; images are square."""

    family: Literal["flux", "sd3", "qwen", "wan"]
    blocks: int
    """With text and image in two streams, or all of them."""
    single_blocks: int
    """With both in one stream; FLUX only."""
    heads: int
    head_width: int
    side: int
    """Image tokens a side, of each frame."""
    text: int
    """Text tokens."""
    prompt_width: int = 4096
    pooled_width: int = 768
    qk_norm: str | None = None
    frames: int = 1
    """Latent frames of a video."""

    @property
    def width(self) -> int:
        """Channels of a token inside the model."""
        return self.heads * self.head_width

    @property
    def rotary(self) -> tuple[int, ...]:
        """Channels of a head that turn with frame, row and column, as FLUX divides them."""
        return tuple(self.head_width * share // 16 for share in (2, 7, 7))

    @property
    def tokens(self) -> int:
        """Image tokens."""
        return self.frames * self.side**2


GEOMETRIES = {
    "flux-dev": Geometry("flux", 19, 38, 24, 128, 64, 512),
    "sd3-medium": Geometry("sd3", 24, 0, 24, 64, 64, 333, pooled_width=2048),
    "sd35-large": Geometry("sd3", 38, 0, 38, 64, 64, 333, pooled_width=2048, qk_norm="rms_norm"),
    "qwen-image": Geometry("qwen", 60, 0, 24, 128, 64, 512, prompt_width=3584),
    "wan-14b": Geometry("wan", 40, 0, 40, 128, 40, 512, frames=21),
    "flux-cpu": Geometry("flux", 2, 4, 8, 64, 32, 64, prompt_width=512),
    "sd3-cpu": Geometry("sd3", 4, 0, 6, 64, 32, 83, prompt_width=512, pooled_width=256),
}
"""By name; `wan-14b` is 81 frames of 640 pixels a side. Those on `-cpu` have the proportions of the
large ones and fit two cores."""


@dataclass(frozen=True)
class Sampler:
    """One model of a geometry, and all inputs of a run."""

    geometry: Geometry
    model: nn.Module
    steps: int
    conditions: dict[str, Any]
    """Keyword arguments of the model that stay the same from step to step."""
    noise: Tensor
    time_scale: float
    """Divisor from the scheduler's times, 1000 to 0, to those of the model."""

    def timesteps(self) -> Tensor:
        """The scheduler's times, in the order of the run."""
        times: Tensor = self._scheduler().timesteps
        return times

    def _scheduler(self) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
        scheduler.set_timesteps(self.steps, device=self.noise.device)
        return scheduler

    @torch.no_grad()
    def run(self, model: Callable[..., Any]) -> Tensor:
        """All steps with `model` (ours, or what compiles it); returns the denoised latent."""
        scheduler, latent = self._scheduler(), self.noise
        for time in scheduler.timesteps:
            velocity = model(**self._call(latent, time))[0]
            if self.guided:
                uncond, cond = velocity.chunk(2)
                velocity = uncond + GUIDANCE["sd3"] * (cond - uncond)
            latent = scheduler.step(velocity, time, latent, return_dict=False)[0]
        return latent

    @property
    def guided(self) -> bool:
        """Whether a batch holds both halves of classifier-free guidance."""
        return self.geometry.family == "sd3"

    def first_call(self) -> dict[str, Any]:
        """Keyword arguments of the model at the first step."""
        return self._call(self.noise, self.timesteps()[0])

    def _call(self, latent: Tensor, time: Tensor) -> dict[str, Any]:
        batch = torch.cat([latent, latent]) if self.guided else latent
        times = (time / self.time_scale).to(latent.dtype).expand(len(batch))
        return {"hidden_states": batch, "timestep": times, **self.conditions}


def at_depth(geometry: Geometry, share: float) -> Geometry:
    """The same geometry with a share of its blocks, at least one of each kind."""

    def fewer(blocks: int) -> int:
        return max(1, round(share * blocks)) if blocks else 0

    return replace(
        geometry, blocks=fewer(geometry.blocks), single_blocks=fewer(geometry.single_blocks)
    )


def require_known(names: Sequence[str]) -> None:
    """Raise SpecdiffError for an unknown geometry."""
    for name in names:
        if name not in GEOMETRIES:
            raise SpecdiffError(f"no geometry {name!r}; there are {', '.join(GEOMETRIES)}")


def build(
    name: str, device: torch.device, dtype: torch.dtype, steps: int = 28, depth: float = 1.0
) -> Sampler:
    """A sampler of a geometry at a share of its depth; weights and inputs are always the same."""
    geometry = at_depth(GEOMETRIES[name], depth)
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    make = {"flux": _flux, "sd3": _sd3, "qwen": _qwen, "wan": _wan}[geometry.family]
    with torch.device(device), torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = make(geometry)
    return make_sampler(geometry, model.to(dtype).eval(), steps, random)


def make_sampler(
    geometry: Geometry, model: nn.Module, steps: int, random: Callable[..., Tensor]
) -> Sampler:
    """The inputs that the pipeline of this family hands to its transformer.

    Qwen-Image and Wan, which guide in separate calls, are called once a step.
    """
    batch = 2 if geometry.family == "sd3" else 1
    conditions: dict[str, Any] = {
        "encoder_hidden_states": random(batch, geometry.text, geometry.prompt_width),
        "return_dict": False,
    }
    inputs = {"flux": _flux_inputs, "sd3": _sd3_inputs, "qwen": _qwen_inputs, "wan": _wan_inputs}
    noise, more = inputs[geometry.family](geometry, random)
    scale = 1000.0 if geometry.family in ("flux", "qwen") else 1.0
    return Sampler(geometry, model, steps, {**conditions, **more}, noise, time_scale=scale)


Random = Callable[..., Tensor]
"""Sizes of the axes -> noise."""


def _flux_inputs(geometry: Geometry, random: Random) -> tuple[Tensor, dict[str, Any]]:
    noise = random(1, geometry.tokens, 64)
    span = torch.arange(geometry.side, device=noise.device).to(noise.dtype)
    return noise, {
        "pooled_projections": random(1, geometry.pooled_width),
        "img_ids": torch.cartesian_prod(span[:1] * 0, span, span),
        "txt_ids": noise.new_zeros(geometry.text, 3),
        "guidance": noise.new_full([1], GUIDANCE["flux"], dtype=torch.float32),
    }


def _sd3_inputs(geometry: Geometry, random: Random) -> tuple[Tensor, dict[str, Any]]:
    noise = random(1, 16, 2 * geometry.side, 2 * geometry.side)
    return noise, {"pooled_projections": random(2, geometry.pooled_width)}


def _qwen_inputs(geometry: Geometry, random: Random) -> tuple[Tensor, dict[str, Any]]:
    return random(1, geometry.tokens, 64), {
        "img_shapes": [[(1, geometry.side, geometry.side)]],
        "encoder_hidden_states_mask": None,
    }


def _wan_inputs(geometry: Geometry, random: Random) -> tuple[Tensor, dict[str, Any]]:
    return random(1, 16, geometry.frames, 2 * geometry.side, 2 * geometry.side), {}


def _flux(geometry: Geometry) -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        num_layers=geometry.blocks,
        num_single_layers=geometry.single_blocks,
        attention_head_dim=geometry.head_width,
        num_attention_heads=geometry.heads,
        joint_attention_dim=geometry.prompt_width,
        pooled_projection_dim=geometry.pooled_width,
        guidance_embeds=True,
        axes_dims_rope=geometry.rotary,
    )


def _sd3(geometry: Geometry) -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=2 * geometry.side,
        num_layers=geometry.blocks,
        attention_head_dim=geometry.head_width,
        num_attention_heads=geometry.heads,
        joint_attention_dim=geometry.prompt_width,
        caption_projection_dim=geometry.width,
        pooled_projection_dim=geometry.pooled_width,
        pos_embed_max_size=3 * geometry.side,
        qk_norm=geometry.qk_norm,
    )


def _qwen(geometry: Geometry) -> Any:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        num_layers=geometry.blocks,
        attention_head_dim=geometry.head_width,
        num_attention_heads=geometry.heads,
        joint_attention_dim=geometry.prompt_width,
        axes_dims_rope=geometry.rotary,
    )


def _wan(geometry: Geometry) -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=geometry.heads,
        attention_head_dim=geometry.head_width,
        text_dim=geometry.prompt_width,
        ffn_dim=geometry.width * 27 // 10,
        num_layers=geometry.blocks,
    )
