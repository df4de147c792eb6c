"""Subject: a trained pipeline, how to call it, and the pictures that are asked of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdiff.errors import SpecdiffError
from specdiff.models import demo, motion, photos, textures

CROPS = {
    "textures": (textures.CLASSES, textures.class_codes, textures.GUIDANCE_SCALE),
    "photos": (photos.CLASSES, photos.class_codes, photos.GUIDANCE_SCALE),
}
"""Models of crops: classes, their codes and the guidance scale, by name."""
MODELS = ("emoji", *CROPS, "motion")
STEPS = 28
TUNED_ON = 24
"""Stored prompts at the start of the demo's list that its defaults may have been tuned on."""
TUNING_SEED = 10_000
"""Seed of the first picture to tune on; evaluations count theirs up from far below."""


@dataclass(frozen=True)
class Request:
    """One picture to make."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Subject:
    """A pipeline with everything that calling it takes.

    Attributes:
        name: One of `MODELS`.
        load: Makes a fresh pipeline, nothing compiled or hooked.
        prompts: What to draw, in turn.
        arguments: The pipeline's arguments for a prompt, without steps, generator and output type.
        to_pixels: Turns latents into pictures `[B, 3, H, W]` in 0..1.
        options: Options that specdiff needs for this pipeline, whatever else is set.
        tuning_prompts: What to tune on; empty: the same, from other seeds.
    """

    name: str
    load: Callable[[], Any]
    prompts: tuple[str, ...]
    arguments: Callable[[str], Mapping[str, Any]]
    to_pixels: Callable[[Tensor], Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    tuning_prompts: tuple[str, ...] = ()

    def requests(self, count: int, seed: int) -> list[Request]:
        """The prompts in turn, each with a seed of its own, counted up from `seed`."""
        return [
            Request(self.prompts[index % len(self.prompts)], seed + index) for index in range(count)
        ]

    def tuning_requests(self, count: int) -> list[Request]:
        """What may be tuned on: none of it is ever measured on."""
        prompts = self.tuning_prompts or self.prompts
        return [
            Request(prompts[index % len(prompts)], TUNING_SEED + index) for index in range(count)
        ]

    def embed(self, requests: Iterable[Request]) -> None:
        """Embed every prompt before any clock runs.

        Raises:
            SpecdiffError: A prompt needs the text encoder, which is not installed.
        """
        for request in requests:
            self.arguments(request.prompt)

    @torch.no_grad()
    def draw(self, pipeline: Any, request: Request, steps: int = STEPS) -> Tensor:
        """Make one picture; returns its final latents on the CPU, so that their time is whole."""
        result: Tensor = pipeline(
            **self.arguments(request.prompt),
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            output_type="latent",
            return_dict=False,
        )[0]
        return result.cpu()

    def picture(self, latents: Tensor) -> Tensor:
        """The picture `[H, W, 3]` in 0..1 of one request's latents."""
        return self.to_pixels(latents)[0].permute(1, 2, 0)


def quiet_libraries() -> None:
    """Keep remarks of diffusers and transformers about parts the demo does not use off the bar."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _silent(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def emoji(device: torch.device) -> Subject:
    """The demo model, on the stored prompts that come after those its defaults were tuned on."""

    def arguments(prompt: str) -> dict[str, Any]:
        try:
            tokens, pooled = demo.prompt_embeddings([prompt])
        except ModuleNotFoundError as error:
            raise SpecdiffError(f"{prompt!r}: {error}") from error
        return {
            "prompt_embeds": tokens.to(device),
            "pooled_prompt_embeds": pooled.to(device),
            "height": demo.PIPELINE_SIDE,
            "width": demo.PIPELINE_SIDE,
        }

    return Subject(
        "emoji",
        lambda: _silent(demo.load_pipeline(device)),
        tuple(demo.stored_prompts()[TUNED_ON:]),
        _remembered(arguments),
        demo.to_pixels,
        tuning_prompts=tuple(demo.stored_prompts()[:TUNED_ON]),
    )


def crops(name: str, device: torch.device, weights: Path | None) -> Subject:
    """A model of `CROPS`, guided: both halves in one batch.

    Raises:
        SpecdiffError: Its weights are missing.
    """
    weights = _found(name, weights)
    classes, class_codes, scale = CROPS[name]

    def arguments(prompt: str) -> dict[str, Any]:
        tokens, pooled = (code.to(device) for code in class_codes([prompt]))
        return {
            "prompt_embeds": tokens,
            "pooled_prompt_embeds": pooled,
            "negative_prompt_embeds": torch.zeros_like(tokens),
            "negative_pooled_prompt_embeds": torch.zeros_like(pooled),
            "guidance_scale": scale,
            "height": textures.PIPELINE_SIDE,
            "width": textures.PIPELINE_SIDE,
        }

    return Subject(
        name,
        lambda: _silent(textures.wrap_pipeline(textures.load_transformer(weights, device))),
        classes,
        _remembered(arguments),
        textures.to_pixels,
        {"guidance_scale": scale},
    )


def moving(device: torch.device, weights: Path | None) -> Subject:
    """Emoji that move, guided by calls of its own; clips are judged as strips of their frames.

    Raises:
        SpecdiffError: Its weights, or the first frames beside them, are missing.
    """
    weights = _found("motion", weights)
    frames = weights.with_name(motion.FIRST_FRAMES)
    if not frames.is_file():
        raise SpecdiffError(f"first frames of the motion model: none beside its weights, {frames}")
    firsts = motion.load_first_frames(frames)

    return Subject(
        "motion",
        lambda: _silent(motion.wrap_pipeline(motion.load_transformer(weights, device))),
        tuple(firsts),
        _remembered(lambda prompt: motion.arguments(prompt, firsts[prompt].to(device))),
        motion.to_pixels,
    )


def _found(name: str, weights: Path | None) -> Path:
    """The weights of a model that does not ship."""
    if weights is not None and weights.is_file():
        return weights
    given = "not given" if weights is None else f"not at {weights}"
    raise SpecdiffError(
        f"weights of the {name} model: {given}. They do not ship with the package: pass"
        f" --weights the path of {name}.safetensors, which a clone of the repository has in"
        f" examples/training/{name}"
    )


def _remembered(
    arguments: Callable[[str], Mapping[str, Any]],
) -> Callable[[str], Mapping[str, Any]]:
    """Embed each prompt once, so that no method pays for it."""
    known: dict[str, Mapping[str, Any]] = {}

    def recall(prompt: str) -> Mapping[str, Any]:
        if prompt not in known:
            known[prompt] = arguments(prompt)
        return known[prompt]

    return recall


def find_subject(model: str, weights: Path | None, device: torch.device) -> Subject:
    """The subject of that name.

    Raises:
        SpecdiffError: There is none, or its weights are missing.
    """
    if model == "emoji":
        return emoji(device)
    if model in CROPS:
        return crops(model, device, weights)
    if model == "motion":
        return moving(device, weights)
    raise SpecdiffError(f"no model {model!r}: choose from {', '.join(MODELS)}")
