"""Train a small image-to-video rectified flow in the architecture of Wan 2.2 on moving emoji.

The first frame is given at time 0; the others are drawn. Stop it at any time and go on with
--resume.

    python examples/training/train_motion.py --minutes 75 --work /tmp/motion-run
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from emoji.pictures import draw_sheet
from motion.data import draw_clips, save_strip, sprites
from torch import Tensor
from training import Stage, Training, parser, shifted_times, train

from specdiff.models.motion import (
    CHANNELS,
    CLASSES,
    FIRST_FRAMES,
    FRAMES,
    TIME_SHIFT,
    class_codes,
    fold,
    load_first_frames,
    to_pixels,
    wrap_pipeline,
)
from specdiff.models.motion import arguments as clip_arguments
from specdiff.models.textures import CODE_WIDTH

MODEL = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": CODE_WIDTH,
    "freq_dim": 128,
    "ffn_dim": 512,
    "num_layers": 5,
    "cross_attn_norm": True,
    "rope_max_seq_len": 64,
}
OUTER = ("",)
"""All is trained by AdamW: Muon's products in bf16 are half of a step on a CPU that has none."""
STAGES = (Stage(batch=8, rate=1.5, ema_decay=0.995),)
CLASS_DROPOUT = 0.1
HELD_OUT = 16
"""One of so many sprites is never trained on."""
OF_EACH = 2
"""Held-out clips of each class."""


def build_model() -> WanTransformer3DModel:
    """Return the untrained model; all that is gated by time starts at zero."""
    model = WanTransformer3DModel(**MODEL)
    for name, module in model.named_modules():
        if name == "proj_out" or name.endswith("time_proj"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    with torch.no_grad():
        for block in model.blocks:
            block.scale_shift_table.zero_()
    return model


class MotionTraining(Training):
    """The run with its data."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        metadata = {"config": json.dumps(MODEL)}
        super().__init__(build_model(), OUTER, STAGES, arguments, "motion", metadata)
        self.codes = class_codes(CLASSES)
        every = sprites(arguments.cache)
        held_out = torch.arange(len(every)) % HELD_OUT == 0
        self.sprites, self.held_out = every[~held_out], every[held_out]

    def clips(self, pool: Tensor, classes: Tensor) -> Tensor:
        """Draw clips of sprites by chance."""
        return draw_clips(pool[torch.randint(len(pool), (len(classes),))], classes)

    def loss(self) -> Tensor:
        """Return the flow-matching loss on a fresh batch; some clips come without a class."""
        classes = torch.randint(len(CLASSES), (self.stage.batch,))
        keep = (torch.rand(len(classes)) >= CLASS_DROPOUT).float()
        data = fold(self.clips(self.sprites, classes)).to(self.device)
        noise = torch.randn_like(data)
        t = shifted_times(len(data), TIME_SHIFT, self.device)
        by_frame = t[:, None].repeat(1, FRAMES)
        by_frame[:, 0] = 0  # it is given
        latent = torch.lerp(data, noise, by_frame[:, None, :, None, None])
        tokens = latent.shape[-1] * latent.shape[-2] // 4
        velocity = self.compiled(
            hidden_states=latent,
            timestep=1000 * by_frame.repeat_interleave(tokens, 1),
            encoder_hidden_states=(self.codes[classes] * keep[:, None, None]).to(self.device),
            return_dict=False,
        )[0]
        return (velocity - (noise - data))[:, :, 1:].square().mean()

    def held_out_clips(self) -> dict[str, Tensor]:
        """Clips of sprites never trained on, always the same, by prompt."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            classes = torch.arange(len(CLASSES)).repeat_interleave(OF_EACH)
            clips = self.clips(self.held_out, classes)
        prompts = [f"{name} {number + 1}" for name in CLASSES for number in range(OF_EACH)]
        return dict(zip(prompts, clips, strict=True))

    def draw(self, is_final: bool) -> None:
        """Write a sheet of clips that go on from first frames never trained on, and these."""
        held_out = self.held_out_clips()
        file = self.work / FIRST_FRAMES
        save_strip([clip[:, 0] for clip in held_out.values()], file)
        every = load_first_frames(file)
        prompts = list(every) if is_final else list(every)[: len(CLASSES)]
        pipeline = wrap_pipeline(self.average)
        pipeline.set_progress_bar_config(disable=True)
        pictures = {}
        for prompt in prompts:
            latents = pipeline(
                **clip_arguments(prompt, every[prompt].to(self.device)),
                num_inference_steps=28,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            ).frames
            pictures[prompt] = to_pixels(latents)[0].cpu()
        draw_sheet(pictures, self.work / f"sheet-{self.at.step:06d}.png", columns=2)


def main() -> None:
    """Parse the command line and train."""
    options = parser(__doc__.splitlines()[0], (75.0,), "motion-run")
    options.add_argument("--cache", type=Path, default=Path("emoji-cache"))
    arguments = options.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    train(MotionTraining(arguments), arguments)


if __name__ == "__main__":
    main()
