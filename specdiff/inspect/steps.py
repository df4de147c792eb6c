"""Steps: what a recording shows of each step, as the templates draw it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from specdiff.inspect.page import count_kinds, with_heights
from specdiff.inspect.picture import difference, token_map
from specdiff.runtime.records.recording import COMPUTED, FORECAST, REUSED, StepRecord

VEILS = {
    COMPUTED: (0, 0, 0, 0),
    REUSED: (33, 102, 172, 175),
    FORECAST: (230, 97, 1, 165),
}
"""Red, green, blue and opacity (0 to 255) that is laid over a token of each class."""
CLASS_NAMES = {
    COMPUTED: "C1, computed: the model ran on this part of the picture",
    REUSED: "C2, reused: what the model said of it last is used again",
    FORECAST: "C3, forecast: predicted from what the model said of it before",
}


def veil(step: StepRecord, height: int, width: int, sample: int = 0) -> Tensor:
    """The classes of one step as colours, to be drawn over a picture.

    Args:
        step: A recorded step.
        height: Of the picture; only the ratio to `width` matters.
        width: Of the picture.
        sample: Row of the batch.

    Returns:
        uint8 [rows, columns, 4], one pixel a token.

    Raises:
        ValueError: The tokens do not fill a picture of this shape.
    """
    grid = token_map(step.classes()[sample], height, width).long()
    colours = torch.zeros(4, 4, dtype=torch.uint8)
    for kind, colour in VEILS.items():
        colours[kind] = torch.tensor(colour, dtype=torch.uint8)
    return colours[grid]


def png(pixels: Tensor) -> str:
    """A data address of a picture: uint8 [H, W, 3 or 4], or float in 0..1."""
    if pixels.is_floating_point():
        pixels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def picture(image: Tensor) -> str:
    """A data address of a picture [H, W, 3] in 0..1."""
    return png(image)


def changed(image: Tensor, reference: Tensor) -> str:
    """A data address of the difference of two pictures, amplified; white where there is none."""
    return png(difference(image, reference))


def recorded_steps(
    steps: Sequence[StepRecord], image: Tensor | None, sample: int = 0
) -> list[dict[str, Any]]:
    """What the page shows of each step; `image` [H, W, 3] is decoded. Waits for the device."""
    shown = [_shown(step, image, sample) for step in steps]
    return with_heights(shown)


def _shown(step: StepRecord, image: Tensor | None, sample: int) -> dict[str, Any]:
    plain = step.to_json()
    shown: str | None = None
    if image is not None and step.tokens:
        try:
            shown = png(veil(step, image.shape[0], image.shape[1], sample))
        except ValueError:  # the tokens of a video, or of no picture
            shown = None
    return {
        "kind": step.kind,
        "share": step.active_share,
        "reason": step.reason,
        "seconds": step.seconds,
        "speculative": step.speculative,
        "time": step.time,
        "held": plain["score_held_by_active"],
        "score": plain["log_score"],
        "importance": plain["importance"],
        "veil": shown,
    }


def kinds_of(steps: Sequence[StepRecord]) -> dict[str, int]:
    """How many steps were of each kind, for a legend."""
    return count_kinds([step.kind for step in steps])


def share_computed(steps: Sequence[StepRecord]) -> float:
    """Tokens computed, look-ahead included, of those that dense steps would have computed."""
    work = sum(step.active_share + step.speculative for step in steps)
    return work / len(steps) if steps else 1.0
