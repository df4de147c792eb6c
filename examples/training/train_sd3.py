"""Train a small class-conditional rectified flow in the SD3 architecture on busy textures.

The model works on pixels: a token is a 2x2 patch of a 64x64 picture. The weights in
examples/training/textures took 2.3 minutes on one H100, without the first stage; a CPU takes a day.

    python examples/training/train_sd3.py --minutes 0 2.3 --work /tmp/textures
"""

import argparse
import json
from dataclasses import dataclass

import torch
from diffusers import SD3Transformer2DModel
from emoji.pictures import draw_sheet
from textures.data import Crops
from torch import Tensor
from training import Stage, Training, parser, shifted_times, train

from specdiff.models.textures import (
    CLASSES,
    CODE_WIDTH,
    GUIDANCE_SCALE,
    PATCH,
    PIPELINE_SIDE,
    SIDE,
    TIME_SHIFT,
    class_codes,
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


@dataclass(frozen=True, kw_only=True)
class TextureStage(Stage):
    """One part of the training; `side` is that of its crops, in pixels."""

    side: int


STAGES = (
    TextureStage(side=SIDE // 2, batch=256, rate=1.0, ema_decay=0.998),
    TextureStage(side=SIDE, batch=128, rate=1.0, ema_decay=0.998),
)
"""Texture is local: small crops teach most of it at a quarter of the cost."""
CLASS_DROPOUT = 0.1
SHEET_ROWS, QUICK_ROWS = 5, 2
"""Samples of each class on the last sheet, and on those on the way."""


def build_model() -> SD3Transformer2DModel:
    """Return the untrained model; every block starts as the identity."""
    model = SD3Transformer2DModel(**MODEL)
    for name, module in model.named_modules():
        if name == "proj_out" or name.endswith(("norm1.linear", "norm1_context.linear")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return model


class TextureTraining(Training):
    """The run with its data."""

    stage: TextureStage

    def __init__(self, arguments: argparse.Namespace) -> None:
        metadata = {"config": json.dumps(MODEL)}
        super().__init__(build_model(), OUTER, STAGES, arguments, "textures", metadata)
        self.crops = Crops()
        self.codes = class_codes(CLASSES)

    def loss(self) -> Tensor:
        """Return the flow-matching loss on a fresh batch; some pictures come without a class."""
        classes = torch.randint(len(CLASSES), (self.stage.batch,))
        keep = (torch.rand(len(classes)) >= CLASS_DROPOUT).float()
        tokens, pooled = (code[classes] for code in self.codes)
        data = self.crops.draw(classes, self.stage.side).to(self.device)
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
        names = [name for name in CLASSES for _ in range(rows)]
        pipeline = wrap_pipeline(self.average)
        pipeline.set_progress_bar_config(disable=True)
        tokens, pooled = (code.to(self.device) for code in class_codes(names))
        latents = pipeline(
            prompt_embeds=tokens,
            pooled_prompt_embeds=pooled,
            negative_prompt_embeds=torch.zeros_like(tokens),
            negative_pooled_prompt_embeds=torch.zeros_like(pooled),
            guidance_scale=GUIDANCE_SCALE,
            height=PIPELINE_SIDE,
            width=PIPELINE_SIDE,
            num_inference_steps=28,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
        titles = [f"{name} {index % rows + 1}" for index, name in enumerate(names)]
        pictures = dict(zip(titles, to_pixels(latents).cpu(), strict=True))
        draw_sheet(pictures, self.work / f"sheet-{self.at.step:06d}.png", columns=rows * 2)


def main() -> None:
    """Parse the command line and train."""
    arguments = parser(__doc__.splitlines()[0], (60.0, 30.0), "textures-run").parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    train(TextureTraining(arguments), arguments)


if __name__ == "__main__":
    main()
