"""A pipeline of one linear layer, and methods on it, to evaluate in a second; and a small FLUX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor, nn

from specdiff.evaluation.method import Candidate, Prepared
from specdiff.models.subject import STEPS, Subject
from tests.models import flux


class ToyPipeline:
    """Denoises `[1, 3, 24, 24]`, the columns of all rows mixed by one matrix."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.transformer: Any = nn.Linear(24, 24)

    def __call__(
        self,
        shade: float,
        num_inference_steps: int,
        generator: torch.Generator,
        output_type: str,
        return_dict: bool,
    ) -> tuple[Tensor]:
        assert output_type == "latent" and not return_dict
        x = torch.randn(1, 3, 24, 24, generator=generator)
        for _ in range(num_inference_steps):
            x = x + (shade - self.transformer(x)) / num_inference_steps
        return (x,)


def toy_subject() -> Subject:
    return Subject(
        "toy",
        ToyPipeline,
        ("dark", "light"),
        lambda prompt: {"shade": -0.3 if prompt == "dark" else 0.3},
        lambda latents: (latents / 2 + 0.5).clamp(0, 1),
    )


def rival(
    name: str, change: Callable[[Any], None], steps: int = STEPS, is_peer: bool = True
) -> Candidate:
    """A method that changes the pipeline and compiles nothing."""

    def eager(pipeline: Any) -> Any:
        change(pipeline)
        return pipeline

    def prepare(pipeline: Any) -> Prepared:
        return Prepared(eager(pipeline), "nothing")

    return Candidate(name, "rivals", steps, {"name": name}, prepare, eager, is_peer)


def dimmed(pipeline: Any) -> None:
    """A change that gives slightly other pictures."""
    inner = pipeline.transformer

    def forward(x: Tensor) -> Tensor:
        result: Tensor = inner(x)
        return 0.99 * result

    pipeline.transformer = forward


def flux_pipeline() -> Any:
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=flux(layers=1, single_layers=2)[0],
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flux_subject() -> Subject:
    generator = torch.Generator().manual_seed(0)
    arguments = {
        "prompt_embeds": torch.randn(1, 4, 24, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 20, generator=generator),
        "height": 64,
        "width": 64,
    }
    return Subject(
        "flux", flux_pipeline, ("a",), lambda prompt: arguments, lambda latents: latents[:, None]
    )
