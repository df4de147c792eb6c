"""Picture: a comparison with a row for each prompt, the methods side by side."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from specdiff.measure.comparison import Comparison, Quality, Trials

AMPLIFICATION = 5
"""Factor by which differences are shown larger; usual ones are invisible."""
PANEL_INCHES = 2.4
DOTS_PER_INCH = 110
PROMPT_WIDTH = 26
"""Letters of a prompt that fit beside its row."""


@dataclass(frozen=True)
class Panel:
    """One column of the picture: a title and how to fill its cell for the prompt of a row."""

    title: str
    draw: Callable[[Axes, int], None]


def difference(image: Tensor, reference: Tensor) -> Tensor:
    """Absolute difference, `AMPLIFICATION` times, clipped to 0..1, inverted: white is no change."""
    return 1 - ((image - reference).abs() * AMPLIFICATION).clamp(0, 1)


def token_map(counts: Tensor, height: int, width: int) -> Tensor:
    """Arrange token counts [N] (or [B, N], averaged over B) like the picture that they belong to.

    Args:
        counts: One number a token, row by row.
        height: Picture height in pixels; only the ratio to `width` matters.
        width: Picture width in pixels.

    Raises:
        ValueError: No grid of N tokens has the shape of the picture.
    """
    flat = counts.double().reshape(-1, counts.shape[-1]).mean(0)
    rows = round(math.sqrt(flat.numel() * height / width))
    if rows == 0 or flat.numel() % rows:
        raise ValueError(f"{flat.numel()} tokens do not fill a picture of {height} x {width}")
    return flat.reshape(rows, -1)


def _caption(quality: Quality, seconds: float) -> str:
    psnr = "identical" if math.isinf(quality.psnr) else f"{quality.psnr:.1f} dB"
    return f"{psnr}, SSIM {quality.ssim:.3f}\n{seconds:.2f} s"


def _image_panel(trials: Trials, is_reference: bool) -> Panel:
    def draw(axes: Axes, row: int) -> None:
        axes.imshow(trials.images[row].clamp(0, 1).numpy(), interpolation="nearest")
        seconds = float(torch.tensor(trials.seconds[row]).median())
        text = f"{seconds:.2f} s" if is_reference else _caption(trials.qualities[row], seconds)
        axes.set_xlabel(text, fontsize=9)

    return Panel(trials.method.name, draw)


def _difference_panel(trials: Trials, reference: Trials) -> Panel:
    def draw(axes: Axes, row: int) -> None:
        shown = difference(trials.images[row], reference.images[row])
        axes.imshow(shown.numpy(), interpolation="nearest")

    return Panel(f"difference from {reference.method.name}\n× {AMPLIFICATION} (white: none)", draw)


def _counts_panel(trials: Trials) -> Panel:
    def draw(axes: Axes, row: int) -> None:
        counts = trials.counts[row]
        if counts is None:
            axes.set_xlabel("no token was left out", fontsize=9)
            return
        height, width = trials.images[row].shape[:2]
        drawn = axes.imshow(token_map(counts, height, width).numpy(), cmap="viridis", vmin=0)
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.03)

    return Panel(f"how often of {trials.method.steps} steps\neach token was computed", draw)


def _panels(comparison: Comparison) -> Iterator[Panel]:
    yield _image_panel(comparison.reference, is_reference=True)
    for trials in comparison.trials[1:]:
        yield _image_panel(trials, is_reference=False)
        yield _difference_panel(trials, comparison.reference)
        if trials.method.usage is not None:
            yield _counts_panel(trials)


def _fill(figure: Figure, panels: Sequence[Panel], prompts: Sequence[str]) -> None:
    grid = figure.subplots(len(prompts), len(panels), squeeze=False)
    for row, prompt in enumerate(prompts):
        for column, panel in enumerate(panels):
            axes = grid[row][column]
            axes.set_xticks([])
            axes.set_yticks([])
            panel.draw(axes, row)
            if row == 0:
                axes.set_title(panel.title, fontsize=10)
        grid[row][0].set_ylabel(textwrap.fill(prompt, PROMPT_WIDTH), fontsize=11)


def draw_comparison(comparison: Comparison, file: Path) -> None:
    """Write the picture of a comparison as a PNG file.

    Raises:
        OSError: The file cannot be written.
    """
    panels = list(_panels(comparison))
    size = (PANEL_INCHES * len(panels), (PANEL_INCHES + 0.5) * len(comparison.requests) + 0.4)
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    _fill(figure, panels, [request.prompt for request in comparison.requests])
    figure.savefig(file, format="png")
