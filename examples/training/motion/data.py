"""Clips of emoji that move: drawn anew for every step of training, from Fluent emoji with alpha."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from emoji.data import list_emoji
from PIL import Image
from torch import Tensor

from specdiff.models.motion import CLASSES, FRAMES, SIDE

SPRITE = 48
"""Pixels a side of the pictures that clips are drawn from."""
SIZES = (0.5, 0.8)
"""Of a sprite, as a share of the frame."""
WAY = (0.35, 0.6)
"""How far one goes in a clip, as a share of the frame."""
GROWTH = (1.4, 1.8)
"""By which factor one grows."""
TURN = (math.pi / 3, 2 * math.pi / 3)
"""By what angle one turns."""
COLOURS = (0.5, 1.0)
"""Of the background, each channel."""


def sprites(cache: Path) -> Tensor:
    """Every emoji, its colours times its alpha: float32 `[N, 4, SPRITE, SPRITE]` in 0..1."""
    file = cache / f"sprites-{SPRITE}.pt"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(torch.stack([_sprite(one.file) for one in list_emoji(cache)]), file)
    stored: Tensor = torch.load(file, weights_only=True)
    return stored.float() / 255


def _sprite(file: Path) -> Tensor:
    with Image.open(file) as opened:
        layer = opened.convert("RGBA").convert("RGBa")
    small = layer.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS)
    values = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    return values.view(SPRITE, SPRITE, 4).permute(2, 0, 1)


def _between(limits: tuple[float, float], count: int) -> Tensor:
    return limits[0] + (limits[1] - limits[0]) * torch.rand(count)


def draw_clips(chosen: Tensor, classes: Tensor) -> Tensor:
    """Clips of these sprites, each moving as its class says, at a random pace.

    Args:
        chosen: Sprites `[B, 4, SPRITE, SPRITE]`.
        classes: int64 `[B]`.

    Returns:
        float32 `[B, 3, FRAMES, SIDE, SIDE]` in [-1, 1].
    """
    count = len(chosen)
    at = torch.linspace(-0.5, 0.5, FRAMES)  # of the way, from its middle
    kind = [classes[:, None] == index for index in range(len(CLASSES))]
    left, right, up, down, grow, shrink, left_turn, right_turn = (one.float() for one in kind)
    way = 2 * _between(WAY, count)[:, None] * at
    x, y = (right - left) * way, (down - up) * way
    growth = _between(GROWTH, count).log()[:, None] * at
    size = _between(SIZES, count)[:, None] * ((grow - shrink) * growth).exp()
    tilt = (right_turn - left_turn) * _between(TURN, count)[:, None] * at
    cos, sin = tilt.cos() / size, tilt.sin() / size
    rows = [cos, sin, -cos * x - sin * y, -sin, cos, sin * x - cos * y]
    maps = torch.stack(rows, -1).reshape(count * FRAMES, 2, 3)
    grid = F.affine_grid(maps, [count * FRAMES, 4, SIDE, SIDE], align_corners=False)
    layers = F.grid_sample(chosen.repeat_interleave(FRAMES, 0), grid, align_corners=False)
    colours, alpha = layers[:, :3], layers[:, 3:]
    ground = _between(COLOURS, 3 * count).view(count, 3, 1, 1).repeat_interleave(FRAMES, 0)
    frames = colours + (1 - alpha) * ground
    return (2 * frames - 1).view(count, FRAMES, 3, SIDE, SIDE).transpose(1, 2)


def save_strip(frames: Sequence[Tensor], file: Path) -> None:
    """Write frames `[3, SIDE, SIDE]` in [-1, 1] side by side."""
    strip = torch.cat(list(frames), -1).add(1).mul(127.5).round().clamp(0, 255).byte()
    Image.fromarray(strip.permute(1, 2, 0).numpy()).save(file)
