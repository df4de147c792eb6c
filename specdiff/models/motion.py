"""A fourth small trained model: emoji that move, image to video, in the architecture of Wan 2.2.

The first of eight frames is given, at time 0 while the others have the time of the step, so that
each token has its own; guidance is in calls of its own. `examples/training/train_motion.py` trained
it; it runs in the unmodified diffusers `WanImageToVideoPipeline`. The weights do not ship with the
package: they lie in a clone's `examples/training/motion`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from specdiff.models.demo import load_model
from specdiff.models.textures import codes_of

if TYPE_CHECKING:
    from diffusers import WanImageToVideoPipeline, WanTransformer3DModel

CLASSES = ("left", "right", "up", "down", "grow", "shrink", "turn left", "turn right")
"""How the first frame moves on."""
FRAMES, SIDE = 8, 32
"""Frames of a clip, and pixels a side of each."""
FOLD = 2
"""Pixels a side of a latent's: folded, as a VAE would have it. A token is 2x2 of these."""
CHANNELS = 3 * FOLD * FOLD
"""Of a latent."""
PIPELINE_FRAMES = 2 * FRAMES - 1
"""What the pipeline must be given as frames: it counts the VAE's, two a latent's."""
TIME_SHIFT = 3.0
"""Shift of the sampling times towards noise, as in training."""
GUIDANCE_SCALE = 3.0
FIRST_FRAMES = "first_frames.png"
"""Beside the weights: of clips that were not trained on, side by side, as many of each class."""


def class_codes(names: Sequence[str]) -> Tensor:
    """The fixed random code of each class, in place of text; no class has the code zero.

    Returns:
        Token states `[B, CODE_TOKENS, CODE_WIDTH]`, float32.

    Raises:
        ValueError: A name is not one of `CLASSES`.
    """
    return codes_of(names, CLASSES, seed=2)[0]


def fold(pictures: Tensor) -> Tensor:
    """Latents `[B, CHANNELS, T, H / 2, W / 2]` of frames `[B, 3, T, H, W]`; nothing is lost."""
    folded = F.pixel_unshuffle(pictures.transpose(1, 2), FOLD)
    return folded.transpose(1, 2)


def unfold(latents: Tensor) -> Tensor:
    """The reverse of `fold`."""
    return F.pixel_shuffle(latents.transpose(1, 2), FOLD).transpose(1, 2)


class Folding(nn.Module):
    """What the pipeline asks of a VAE."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            z_dim=CHANNELS,
            latents_mean=[0.0] * CHANNELS,
            latents_std=[1.0] * CHANNELS,
            scale_factor_temporal=2,
            scale_factor_spatial=FOLD,
        )
        self.dtype, self.device = torch.float32, device

    def encode(self, frames: Tensor) -> SimpleNamespace:
        """Its `latents`, of frames in [-1, 1]."""
        return SimpleNamespace(latents=fold(frames))


def load_transformer(weights: Path, device: str | torch.device = "cpu") -> WanTransformer3DModel:
    """Load the trained transformer in float32, in evaluation mode.

    Args:
        weights: A safetensors file with the model's configuration in its metadata.
        device: Where to put the weights.
    """
    from diffusers import WanTransformer3DModel

    model: WanTransformer3DModel = load_model(WanTransformer3DModel, weights, device)
    return model


def wrap_pipeline(transformer: Any) -> WanImageToVideoPipeline:
    """A plain diffusers pipeline around the transformer, without text encoder.

    Call it with `arguments` and `output_type="latent"`; pass what it returns to `to_pixels`.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline

    return WanImageToVideoPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=TIME_SHIFT),
        vae=Folding(transformer.device),
        text_encoder=None,
        tokenizer=None,
        expand_timesteps=True,
    )


def load_first_frames(file: Path) -> dict[str, Tensor]:
    """First frames `[1, 3, SIDE, SIDE]` in 0..1 by prompt, "left 1" to "turn right 2"."""
    with Image.open(file) as opened:
        strip = opened.convert("RGB")
    values = torch.frombuffer(bytearray(strip.tobytes()), dtype=torch.uint8)
    tiles = (values.view(SIDE, -1, 3).permute(2, 0, 1) / 255).unsqueeze(0).split(SIDE, dim=-1)
    each = len(tiles) // len(CLASSES)
    return {
        f"{name} {number + 1}": tiles[index * each + number]
        for number in range(each)
        for index, name in enumerate(CLASSES)
    }


def arguments(prompt: str, first: Tensor) -> dict[str, Any]:
    """The pipeline's arguments for a clip, where `first` is, but steps, generator and output type.

    Args:
        prompt: a class and a number, such as "turn left 2".
        first: frame `[1, 3, SIDE, SIDE]` in 0..1.
    """
    code = class_codes([prompt.rpartition(" ")[0]]).to(first.device)
    return {
        "image": first,
        "prompt_embeds": code,
        "negative_prompt_embeds": torch.zeros_like(code),
        "guidance_scale": GUIDANCE_SCALE,
        "height": SIDE,
        "width": SIDE,
        "num_frames": PIPELINE_FRAMES,
    }


def to_pixels(latents: Tensor) -> Tensor:
    """Turn latents `[B, CHANNELS, T, H / 2, W / 2]` into strips of frames, float32 in [0, 1].

    Returns:
        `[B, 3, H, T W]`: the frames side by side.
    """
    frames = (unfold(latents.float()) / 2 + 0.5).clamp(0, 1)
    return torch.cat(frames.unbind(2), dim=-1)
