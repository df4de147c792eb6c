"""The methods that the demo compares, each with a pipeline and compiled weights of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import specdiff
from specdiff import torch_adapter
from specdiff.comparison import Method, Request
from specdiff.demo import (
    PIPELINE_SIDE,
    built_in_prompts,
    load_pipeline,
    prompt_embeddings,
    to_pixels,
)
from specdiff.errors import SpecdiffError
from specdiff.options import Options
from specdiff.runtime.records.recording import StepRecord

BUILT_IN = 4
"""Built-in prompts drawn when none is given: as many rows as a screen shows."""


@dataclass(frozen=True)
class Setting:
    """What all methods of one run of the demo share.

    Attributes:
        device: Where the pipelines run.
        steps: Denoising steps of one picture.
        options: On top of the defaults; settings of Inductor among them are for all.
        embeddings: Token states and pooled state of each prompt, made before any clock runs.
    """

    device: torch.device
    steps: int
    options: Mapping[str, object]
    embeddings: Mapping[str, tuple[Tensor, Tensor]]


def quiet_libraries() -> None:
    """Keep remarks of diffusers and transformers about parts the demo does not use off the bar."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def usable_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        SpecdiffError: There is none, or torch cannot use it here.
    """
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:
        raise SpecdiffError(f"no device {name!r} here: {error}") from error


def demo_requests(prompts: Sequence[str], seed: int) -> list[Request]:
    """One picture a prompt, each with a seed of its own; a few built-in ones if none is given."""
    chosen = prompts or built_in_prompts()[:BUILT_IN]
    return [Request(prompt, seed + index) for index, prompt in enumerate(chosen)]


def embed(requests: Sequence[Request], device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """Embed each prompt once: shapes [1, T, 384] and [1, 384].

    Raises:
        SpecdiffError: A prompt needs the text encoder, which is not installed.
    """
    embeddings = {}
    for prompt in {request.prompt for request in requests}:
        try:
            tokens, pooled = prompt_embeddings([prompt])
        except ModuleNotFoundError as error:
            raise SpecdiffError(f"{prompt!r}: {error}") from error
        embeddings[prompt] = (tokens.to(device), pooled.to(device))
    return embeddings


def picture_maker(pipeline: Any, setting: Setting, steps: int) -> Callable[[Request], Tensor]:
    """Bind a pipeline to a number of steps; pictures arrive on the CPU, so their time is whole."""

    def generate(request: Request) -> Tensor:
        tokens, pooled = setting.embeddings[request.prompt]
        latents = pipeline(
            prompt_embeds=tokens,
            pooled_prompt_embeds=pooled,
            height=PIPELINE_SIDE,
            width=PIPELINE_SIDE,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            output_type="latent",
        ).images
        return to_pixels(latents)[0].permute(1, 2, 0).cpu()

    return generate


def compiled_pipeline(setting: Setting, **compile_arguments: Any) -> Any:
    """The demo pipeline with its transformer compiled, one graph or an error."""
    pipeline: Any = load_pipeline(setting.device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer = torch.compile(pipeline.transformer, fullgraph=True, **compile_arguments)
    return pipeline


def dense_methods(setting: Setting, fewer_steps: Sequence[int]) -> tuple[Method, list[Method]]:
    """The reference, and the same compiled model run for fewer steps."""
    _, given = Options.parse(setting.options, torch_adapter.inductor_keys())
    settings = torch_adapter.inductor_settings(given)
    pipeline = compiled_pipeline(setting, backend="inductor", options=settings)
    reference = Method("dense", setting.steps, picture_maker(pipeline, setting, setting.steps))
    shorter = [
        Method(
            f"dense, {steps} steps", steps, picture_maker(pipeline, setting, steps), compiles=False
        )
        for steps in fewer_steps
    ]
    return reference, shorter


def _selective(setting: Setting, name: str, options: Mapping[str, object]) -> Method:
    pipeline = compiled_pipeline(setting, backend="specdiff", options=dict(options))
    compiled = pipeline.transformer
    generate = picture_maker(pipeline, setting, setting.steps)
    return Method(
        name,
        setting.steps,
        generate,
        lambda: specdiff.stats(compiled),
        options,
        model=compiled,
    )


def demo_methods(setting: Setting, fewer_steps: Sequence[int] = ()) -> list[Method]:
    """Dense first, then specdiff with the options, with `method="paper"`, then fewer steps.

    Nothing is compiled yet: that happens with the first picture of each.
    """
    reference, shorter = dense_methods(setting, fewer_steps)
    default = _selective(setting, "specdiff", setting.options)
    paper = _selective(setting, "specdiff, paper", {**setting.options, "method": "paper"})
    return [reference, default, paper, *shorter]


def record_methods(
    methods: Sequence[Method], requests: Sequence[Request]
) -> dict[str, list[list[StepRecord]]]:
    """Draw every picture once more and keep what each step did, of methods that can be recorded."""
    recorded: dict[str, list[list[StepRecord]]] = {}
    for method in methods:
        for request in requests if method.model is not None else ():
            assert method.model is not None
            with specdiff.record(method.model) as recording:
                method.generate(request)
            recorded.setdefault(method.name, []).append(recording.steps)
    return recorded
