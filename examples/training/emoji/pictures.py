"""Positions, sampling and the sheet of samples that a training run leaves behind."""

import itertools
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from specdiff.models.demo import TEXT_TOKENS, TIME_SHIFT, TOKEN_SIDE, to_pixels

from .data import EmojiData
from .prompts import HELD_OUT_PROMPTS


def position_ids(side: int) -> Tensor:
    """Return ids `[side ** 2, 3]` as (0, row, column), spread over the final grid."""
    scale = TOKEN_SIDE / side
    line = torch.arange(side) * scale + (scale - 1) / 2
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).view(-1, 3)


@torch.no_grad()
def sample(
    model: torch.nn.Module,
    data: EmojiData,
    prompts: list[str],
    side: int,
    steps: int = 28,
    cfg: float = 1.0,
) -> dict[str, Tensor]:
    """Sample prompts with Euler steps at the times of the pipeline's scheduler.

    Returns:
        For each prompt a picture `[3, 4 side, 4 side]` in [0, 1].
    """
    device = next(model.parameters()).device
    index = torch.tensor([data.names.index(prompt) for prompt in prompts])
    tokens, pooled = data.tokens[index, 0].to(device), data.pooled[index, 0].to(device)
    ids = position_ids(side).to(device), torch.zeros(TEXT_TOKENS, 3, device=device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(prompts), side * side, 48, generator=generator).to(device)
    linear = torch.linspace(1, 1 / steps, steps)
    times = torch.cat(
        [TIME_SHIFT * linear / (1 + (TIME_SHIFT - 1) * linear), torch.zeros(1)]
    ).tolist()

    def velocity(now: float, keep: float) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return model(
                hidden_states=x,
                timestep=torch.full((len(x),), now, device=device),
                encoder_hidden_states=tokens * keep,
                pooled_projections=pooled * keep,
                img_ids=ids[0],
                txt_ids=ids[1],
                return_dict=False,
            )[0].float()

    for now, after in itertools.pairwise(times):
        v = velocity(now, 1.0)
        if cfg != 1.0:
            v = torch.lerp(velocity(now, 0.0), v, cfg)
        x = x + (after - now) * v
    return dict(zip(prompts, to_pixels(x).cpu(), strict=True))


def draw_sheet(pictures: dict[str, Tensor], file: Path, columns: int = 8) -> None:
    """Write all pictures with their prompts; prompts never trained on are in red."""
    rows = -(-len(pictures) // columns)
    height, width = next(iter(pictures.values())).shape[1:]
    figure = Figure(figsize=(1.5 * columns * width / height, 1.7 * rows), layout="tight")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (prompt, picture) in zip(axes.flat, pictures.items(), strict=False):
        axis.imshow(picture.permute(1, 2, 0).numpy())
        axis.set_title(prompt, fontsize=9, color="red" if prompt in HELD_OUT_PROMPTS else "black")
    figure.savefig(file, dpi=100)
