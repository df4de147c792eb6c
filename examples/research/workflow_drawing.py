"""What every workflow of `workflows.py` is made of: a loaded drawing, a scheduler, a picture."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from specdiff.models import demo

SIDE = 128


@dataclass(frozen=True)
class Drawing:
    """One workflow, loaded."""

    model: nn.Module
    scheduler: Any
    draw: Callable[[int, str, int], Tensor]
    """A picture [1, 3, height, width] of so many steps, a prompt, a seed."""
    times: Callable[[int], Tensor]
    """What the scheduler's timesteps will be."""
    second: nn.Module | None = None
    """Another model that has some of the steps."""

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """Those that draw."""
        return (self.model,) if self.second is None else (self.model, self.second)


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


def flux(pipe: Any, steps: int, prompt: str, seed: int, **more: Any) -> Tensor:
    """A picture of diffusers' FLUX pipeline."""
    tokens, pooled = (each.to(pipe.dtype) for each in demo.prompt_embeddings([prompt]))
    torch.manual_seed(seed)  # some schedulers draw from the global generator
    latents = pipe(
        prompt_embeds=tokens, pooled_prompt_embeds=pooled, num_inference_steps=steps,
        height=demo.PIPELINE_SIDE, width=demo.PIPELINE_SIDE, output_type="latent",
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"], **more,
    ).images  # fmt: skip
    return demo.to_pixels(latents.float())


def times_of(pipe: Any, steps: int) -> Tensor:
    """What the timesteps of the pipeline will be."""
    import numpy

    sigmas = numpy.linspace(1.0, 1 / steps, steps)
    of_flow = pipe.scheduler.config.get("use_flow_sigmas", False)
    pipe.scheduler.set_timesteps(steps) if of_flow else pipe.scheduler.set_timesteps(sigmas=sigmas)
    times: Tensor = pipe.scheduler.timesteps
    return times


@cache
def base() -> Tensor:
    """The picture that others are made from."""
    pipe = demo.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return flux(pipe, 10, "watermelon", 3)
