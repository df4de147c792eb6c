"""A second small trained model: busy textures, in the SD3 architecture, with guidance in one batch.

A class-conditional rectified flow, trained by `examples/training/train_sd3.py`, that runs in the
unmodified diffusers `StableDiffusion3Pipeline`. It works on pixels: a token is a 2x2 patch of a
64x64 picture, 1,024 in all. The weights do not ship with the package: they lie in a clone's
`examples/training/textures`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specdiff.models.demo import load_model

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

CLASSES = ("brick", "grass", "gravel", "coins", "page", "galaxies", "tissue", "workshop")
SIDE = 64
"""Pixels a side."""
PATCH = 2
"""Pixels a side of a token."""
PIPELINE_SIDE = 8 * SIDE
"""What the pipeline must be given as height and width: without a VAE it counts 8 pixels a pixel."""
TIME_SHIFT = 3.0
"""Shift of the sampling times towards noise, as in training."""
GUIDANCE_SCALE = 3.0
CODE_TOKENS, CODE_WIDTH = 4, 64
"""Shape of the code that stands for a class where the pipeline expects text."""


def class_codes(names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The fixed random code of each class, in place of text; no class has the code zero.

    Returns:
        Token states `[B, CODE_TOKENS, CODE_WIDTH]` and pooled states `[B, CODE_WIDTH]`, float32.

    Raises:
        ValueError: A name is not one of `CLASSES`.
    """
    return codes_of(names, CLASSES, seed=0)


def codes_of(names: Sequence[str], classes: Sequence[str], seed: int) -> tuple[Tensor, Tensor]:
    """The code of each name among `classes`, see `class_codes`; another seed makes other codes."""
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise ValueError(f"no class {unknown[0]!r}; there are {', '.join(classes)}")
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(len(classes), CODE_TOKENS + 1, CODE_WIDTH, generator=generator)
    chosen = codes[[classes.index(name) for name in names]]
    return chosen[:, 1:], chosen[:, 0]


def load_transformer(weights: Path, device: str | torch.device = "cpu") -> SD3Transformer2DModel:
    """Load the trained transformer in float32, in evaluation mode.

    Args:
        weights: A safetensors file with the model's configuration in its metadata.
        device: Where to put the weights.
    """
    from diffusers import SD3Transformer2DModel

    model: SD3Transformer2DModel = load_model(SD3Transformer2DModel, weights, device)
    return model


def wrap_pipeline(transformer: Any) -> StableDiffusion3Pipeline:
    """A plain diffusers pipeline around the transformer, without text encoders and VAE.

    Call it with the results of `class_codes`, zeros as the negative ones, `guidance_scale`,
    `height=width=PIPELINE_SIDE` and `output_type="latent"`; pass the latents to `to_pixels`.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=TIME_SHIFT),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def to_pixels(latents: Tensor) -> Tensor:
    """Turn latents `[B, 3, H, W]`, colours in [-1, 1], into float32 pictures in [0, 1]."""
    return (latents.float() / 2 + 0.5).clamp(0, 1)
