"""Train the probes of `specdiff eval --probe`: linear classifiers of real pictures' deep features.

    python examples/training/train_probe.py textures
    python examples/training/train_probe.py emoji --cache emoji-cache      (downloads by npm)

A probe knows the prompts that are drawn; it sees real pictures, mirrored, shifted and scaled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from emoji.data import _picture, list_emoji
from safetensors.torch import save_file
from textures.data import Crops
from torch import Tensor
from torch.nn import functional

from specdiff.evaluation.features import features
from specdiff.models.demo import stored_prompts
from specdiff.models.textures import CLASSES, SIDE

VIEWS = 16
"""Pictures a class that the probe is trained on; as many again test it."""
RIDGE = 1.0
"""Weight of the penalty, in units of the mean squared feature."""


def texture_pictures() -> tuple[list[str], Tensor]:
    """The class names and real crops `[C, 2 VIEWS, 3, H, W]` in 0..1."""
    crops, generator = Crops(), torch.Generator().manual_seed(0)
    classes = torch.arange(len(CLASSES)).repeat_interleave(2 * VIEWS)
    drawn = crops.draw(classes, SIDE, generator) / 2 + 0.5
    return list(CLASSES), drawn.unflatten(0, (len(CLASSES), -1))


def emoji_pictures(cache: Path) -> tuple[list[str], Tensor]:
    """The stored prompts and views of their emoji, as `texture_pictures`."""
    cache.mkdir(parents=True, exist_ok=True)
    files = {one.name: one.file for one in list_emoji(cache)}
    names = [name for name in stored_prompts() if name in files]
    generator = torch.Generator().manual_seed(0)
    real = [_picture(files[name], 128).float() / 255 for name in names]
    return names, torch.stack([torch.stack(_views(one, generator)) for one in real])


def _views(picture: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Mirrored, shifted and scaled copies on white."""
    views = []
    for _ in range(2 * VIEWS):
        mirror, scale, right, down = torch.rand(4, generator=generator).tolist()
        size = 1 / (0.8 + 0.4 * scale)
        across = size if mirror < 0.5 else -size
        shift = torch.tensor([[across, 0, 0.2 * (right - 0.5)], [0, size, 0.2 * (down - 0.5)]])
        grid = functional.affine_grid(shift[None], [1, *picture.shape], align_corners=False)
        moved = functional.grid_sample(picture[None] - 1, grid, align_corners=False) + 1
        views.append(moved[0])
    return views


def fit(pooled: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge regression onto the classes from features `[C, V, D]`: weight `[C, D]`, bias `[C]`."""
    x, labels = pooled.flatten(0, 1).double(), torch.eye(len(pooled)).double()
    y = labels.repeat_interleave(pooled.shape[1], 0)
    mean, centre = x.mean(0), y.mean(0)
    penalty = RIDGE * (x - mean).square().mean() * torch.eye(x.shape[1])
    solution = torch.linalg.solve((x - mean).T @ (x - mean) + penalty, (x - mean).T @ (y - centre))
    return solution.T.float(), (centre - mean @ solution).float()


def main(
    model: Annotated[str, typer.Argument(help="emoji or textures")],
    cache: Annotated[Path, typer.Option(help="Of the emoji data.")] = Path("emoji-cache"),
) -> None:
    """Train one probe and write it beside this file."""
    names, pictures = texture_pictures() if model == "textures" else emoji_pictures(cache)
    pooled = torch.stack([features(views).pooled for views in pictures])
    weight, bias = fit(pooled[:, :VIEWS])
    choice = (pooled[:, VIEWS:] @ weight.T + bias).argmax(-1)
    share = (choice == torch.arange(len(names))[:, None]).float().mean()
    print(f"{model}: {len(names)} prompts, {share:.1%} of other views of real pictures recognised")
    file = Path(__file__).parent / f"{model}-probe.safetensors"
    save_file({"weight": weight.half(), "bias": bias.half()}, file, {"names": json.dumps(names)})
    file.chmod(0o644)  # safetensors writes for the owner alone


if __name__ == "__main__":
    typer.run(main)
