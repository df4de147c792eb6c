"""Train a small text-to-image rectified flow in the FLUX architecture on Fluent emoji.

The model works on pixels: a token is a 4x4 patch. The first stage learns from small pictures,
their positions spread over the range of the large ones; the second from large pictures of which
each step sees a quarter of the tokens; the last from whole ones. Run it on a CPU or a GPU:

    python examples/training/train_emoji.py --minutes 15 50 30 --work /tmp/emoji
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from emoji.data import EmojiData, prepare
from emoji.model import MODEL, OUTER, build_model
from emoji.pictures import draw_sheet, position_ids, sample
from emoji.prompts import HELD_OUT_PROMPTS, TRAINED_PROMPTS
from emoji.stages import STAGES, EmojiStage
from torch import Tensor
from training import Training, parser, shifted_times, train

from specdiff.models.demo import TEXT_TOKENS, TIME_SHIFT, pack

CAPTION_SHARES = (0.45, 0.35, 0.2)
CAPTION_DROPOUT = 0.1
QUICK_PROMPTS, QUICK_STEPS = 16, 14
"""Size of the sample sheets on the way; the last one is complete."""


class EmojiTraining(Training):
    """The run with its data."""

    stage: EmojiStage

    def __init__(self, arguments: argparse.Namespace) -> None:
        metadata = {"config": json.dumps(MODEL)}
        super().__init__(build_model(), OUTER, STAGES, arguments, "emoji", metadata)
        self.guidance: list[float] = arguments.guidance
        self.data: EmojiData = prepare(arguments.cache)

    def kept_tokens(self) -> Tensor:
        """Draw which tokens a step sees, in turn a window or one token from each small block.

        Windows teach how neighbours fit together, the others how the whole picture looks.
        """
        side, kept = self.stage.token_side, self.stage.kept_side
        grid = torch.arange(side * side).view(side, side)
        if self.at.step % 2:
            top, left = torch.randint(side - kept + 1, (2,)).tolist()
            return grid[top : top + kept, left : left + kept].flatten()
        block = side // kept
        inside = torch.randint(block, (2, kept, kept))
        start = torch.arange(kept) * block
        return grid[start[:, None] + inside[0], start[None, :] + inside[1]].flatten()

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Draw packed pictures in [-1, 1], token states and pooled states."""
        data, size = self.data, self.stage.batch
        index = data.train[torch.randint(len(data.train), (size,))]
        caption = torch.multinomial(torch.tensor(CAPTION_SHARES), size, replacement=True)
        keep = (torch.rand(size) >= CAPTION_DROPOUT).float()
        pictures = data.pictures[self.stage.side][index].float() / 127.5 - 1
        tokens = data.tokens[index, caption] * keep[:, None, None]
        pooled = data.pooled[index, caption] * keep[:, None]
        return pack(pictures).to(self.device), tokens.to(self.device), pooled.to(self.device)

    def velocity(
        self,
        network: Callable[..., Any],
        x: Tensor,
        t: Tensor,
        text: list[Tensor],
        ids: Tensor,
    ) -> Tensor:
        """Run the network in bfloat16 and return the velocity in float32."""
        with torch.autocast(self.device.type, torch.bfloat16):
            return network(
                hidden_states=x,
                timestep=t,
                encoder_hidden_states=text[0],
                pooled_projections=text[1],
                txt_ids=torch.zeros(TEXT_TOKENS, 3, device=self.device),
                img_ids=ids,
                return_dict=False,
            )[0].float()

    def loss(self) -> Tensor:
        """Return the flow-matching loss on a fresh batch.

        With guidance g in [0, 1) the target moves away from the model's own unconditional answer,
        so that plain sampling behaves like classifier-free guidance of scale 1 / (1 - g)
        ("model guidance", arXiv 2502.12154).
        """
        data, *text = self.batch()
        kept = self.kept_tokens().to(self.device)
        data, ids = data[:, kept], position_ids(self.stage.token_side).to(self.device)[kept]
        # the times that sampling visits: a picture's colours are decided in heavy noise
        t = shifted_times(len(data), TIME_SHIFT, self.device)
        noise = torch.randn_like(data)
        x = torch.lerp(data, noise, t[:, None, None])
        velocity, target = self.velocity(self.compiled, x, t, text, ids), noise - data
        if guidance := self.guidance[self.at.stage]:
            with torch.no_grad():
                nothing = [torch.zeros_like(states) for states in text]
                # not compiled: that would take longer than it saves in a short stage
                plain = self.velocity(self.model, x, t, nothing, ids)
            target = target + guidance * (velocity.detach() - plain)
        return (velocity - target).square().mean()

    def draw(self, is_final: bool) -> None:
        """Write a sample sheet of the averaged weights."""
        prompts, steps = (None, 28) if is_final else (QUICK_PROMPTS, QUICK_STEPS)
        chosen = [*TRAINED_PROMPTS, *HELD_OUT_PROMPTS][:prompts]
        pictures = sample(self.average, self.data, chosen, self.stage.token_side, steps)
        draw_sheet(pictures, self.work / f"sheet-{self.at.stage}-{self.at.step:06d}.png")


def main() -> None:
    """Parse the command line and train."""
    options = parser(__doc__.splitlines()[0], (15.0, 50.0, 30.0), "emoji-run")
    options.add_argument("--guidance", type=float, nargs=len(STAGES), default=[0.0, 0.0, 0.5])
    options.add_argument("--cache", type=Path, default=Path("emoji-cache"))
    arguments = options.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    train(EmojiTraining(arguments), arguments)


if __name__ == "__main__":
    main()
