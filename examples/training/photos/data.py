"""Photographs: six from a Debian package, two that ship with scikit-image; NOTICE names them."""

import subprocess
from pathlib import Path

import torch
from PIL import Image
from skimage import data
from torch import Tensor

from specdiff.models.photos import CLASSES

PACKAGE = "lomiri-wallpapers-16.04"
FOLDER = Path("usr/share/backgrounds")
WALLPAPERS = {
    "stream": "life_by_Aitzol_Berasategi.jpg",
    "peaks": "picosdeeuropa_by_Aitzol_Berasategi.jpg",
    "hillside": "aitzgorri_by_Aitzol_Berasategi.jpg",
    "brushes": "Picture_1A_by_freespace.jpg",
    "fig": "Picture_0B_by_freespace.jpg",
    "dandelions": "seeding_by_Clements_Engelhardt.jpg",
}
SAMPLES = {"cat": data.chelsea, "coffee": data.coffee}
SHORT_SIDES = (72, 96, 128)
"""Pixels of a photograph's shorter side: a crop of 64 shows most of it, or half."""


def fetch(cache: Path) -> None:
    """Download the Debian package with apt and unpack it into `cache`."""
    cache.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", PACKAGE], cwd=cache, check=True)
    for package in cache.glob(f"{PACKAGE}_*.deb"):
        subprocess.run(["dpkg", "-x", package, cache], check=True)


def _original(name: str, cache: Path) -> Image.Image:
    if name in SAMPLES:
        return Image.fromarray(SAMPLES[name]())
    return Image.open(cache / FOLDER / WALLPAPERS[name]).convert("RGB")


def _reduced(picture: Image.Image, short: int) -> Tensor:
    """The picture with that shorter side: float32 `[3, H, W]` in [-1, 1]."""
    scale = short / min(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    pixels = list(picture.resize((width, height), Image.Resampling.LANCZOS).tobytes())
    grid = torch.tensor(pixels, dtype=torch.float32).view(height, width, 3)
    return grid.permute(2, 0, 1) / 127.5 - 1


def photographs(cache: Path) -> list[list[Tensor]]:
    """Each class's photograph at every size, in the order of `CLASSES`; fetches what is missing."""
    if not (cache / FOLDER).is_dir():
        fetch(cache)
    originals = [_original(name, cache) for name in CLASSES]
    return [[_reduced(picture, short) for short in SHORT_SIDES] for picture in originals]
