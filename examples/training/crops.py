"""Crops: a class-conditional rectified flow in the SD3 architecture, which two models share."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import SD3Transformer2DModel
from emoji.pictures import draw_sheet
from torch import Tensor
from training import Stage, Training, shifted_times

from specdiff.models.textures import (
    CODE_WIDTH,
    PATCH,
    PIPELINE_SIDE,
    SIDE,
    TIME_SHIFT,
    to_pixels,
    wrap_pipeline,
)

MODEL = {
    "sample_size": SIDE,
    "patch_size": PATCH,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 5,
    "attention_head_dim": 40,
    "num_attention_heads": 4,
    "joint_attention_dim": CODE_WIDTH,
    "caption_projection_dim": 160,
    "pooled_projection_dim": CODE_WIDTH,
    "pos_embed_max_size": SIDE // PATCH,
    "qk_norm": "rms_norm",
}
OUTER = ("pos_embed", "proj_out", "norm_out", "context_embedder")
CLASS_DROPOUT = 0.1
SHEET_ROWS, QUICK_ROWS = 5, 2
"""Samples of each class on the last sheet, and on those on the way."""


@dataclass(frozen=True, kw_only=True)
class CropStage(Stage):
    """One part of the training; `side` is that of its crops, in pixels."""

    side: int


@dataclass(frozen=True)
class Classes:
    """What a model of crops draws.

    Attributes:
        weights: Name of its file of weights, without suffix.
        names: The classes.
        codes: The codes of names, in place of text.
        guidance_scale: With which its sheets are drawn.
        mirrored: Whether crops of a class may be mirrored.
    """

    weights: str
    names: tuple[str, ...]
    codes: Callable[[Sequence[str]], tuple[Tensor, Tensor]]
    guidance_scale: float
    mirrored: Callable[[str], bool] = lambda name: True


def build_model() -> SD3Transformer2DModel:
    """Return the untrained model; every block starts as the identity."""
    model = SD3Transformer2DModel(**MODEL)
    for name, module in model.named_modules():
        if name == "proj_out" or name.endswith(("norm1.linear", "norm1_context.linear")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return model


class CropTraining(Training):
    """The run with its data.

    Args:
        classes: What to draw.
        pictures: Of each class, float32 `[3, H, W]` in [-1, 1].
        stages: What to train in turn.
        arguments: Of the command line.
    """

    stage: CropStage

    def __init__(
        self,
        classes: Classes,
        pictures: list[list[Tensor]],
        stages: Sequence[CropStage],
        arguments: argparse.Namespace,
    ) -> None:
        metadata = {"config": json.dumps(MODEL)}
        super().__init__(build_model(), OUTER, stages, arguments, classes.weights, metadata)
        self.classes, self.pictures = classes, pictures
        self.codes = classes.codes(classes.names)

    def crop(self, index: int) -> Tensor:
        """Draw a crop of a class: float32 `[3, side, side]` in [-1, 1]."""

        def below(limit: int) -> int:
            return int(torch.randint(limit, ()))

        choices, side = self.pictures[index], self.stage.side
        whole = choices[below(len(choices))]
        top, left = (below(size - side + 1) for size in whole.shape[1:])
        crop = whole[:, top : top + side, left : left + side]
        return (
            crop.flip(-1) if self.classes.mirrored(self.classes.names[index]) and below(2) else crop
        )

    def loss(self) -> Tensor:
        """Return the flow-matching loss on a fresh batch; some pictures come without a class."""
        classes = torch.randint(len(self.classes.names), (self.stage.batch,))
        keep = (torch.rand(len(classes)) >= CLASS_DROPOUT).float()
        tokens, pooled = (code[classes] for code in self.codes)
        data = torch.stack([self.crop(index) for index in classes.tolist()]).to(self.device)
        t = shifted_times(len(data), TIME_SHIFT, self.device)
        noise = torch.randn_like(data)
        with torch.autocast(self.device.type, torch.bfloat16):
            velocity = self.compiled(
                hidden_states=torch.lerp(data, noise, t[:, None, None, None]),
                timestep=1000 * t,
                encoder_hidden_states=(tokens * keep[:, None, None]).to(self.device),
                pooled_projections=(pooled * keep[:, None]).to(self.device),
                return_dict=False,
            )[0].float()
        return (velocity - (noise - data)).square().mean()

    def draw(self, is_final: bool) -> None:
        """Write a sheet with a few samples of each class, drawn by the pipeline."""
        rows = SHEET_ROWS if is_final else QUICK_ROWS
        names = [name for name in self.classes.names for _ in range(rows)]
        pipeline = wrap_pipeline(self.average)
        pipeline.set_progress_bar_config(disable=True)
        tokens, pooled = (code.to(self.device) for code in self.classes.codes(names))
        latents = pipeline(
            prompt_embeds=tokens,
            pooled_prompt_embeds=pooled,
            negative_prompt_embeds=torch.zeros_like(tokens),
            negative_pooled_prompt_embeds=torch.zeros_like(pooled),
            guidance_scale=self.classes.guidance_scale,
            height=PIPELINE_SIDE,
            width=PIPELINE_SIDE,
            num_inference_steps=28,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
        titles = [f"{name} {index % rows + 1}" for index, name in enumerate(names)]
        pictures = dict(zip(titles, to_pixels(latents).cpu(), strict=True))
        draw_sheet(pictures, self.work / f"sheet-{self.at.step:06d}.png", columns=rows * 2)
