"""The observations as one sheet of plots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PREDICTORS = ("history", "future", "both")


def _recall(axes: Axes, found: Mapping[str, Any], truth: str) -> None:
    for name, row in zip(PREDICTORS, found["recall"][truth], strict=True):
        axes.plot(range(2, 2 + len(row)), row, label=name)
    axes.axhline(found["share"], color="0.7", linestyle=":", label="chance")
    axes.set(title=f"figure 4: recall of tokens by\n{truth}", xlabel="step", ylim=(0, 1.02))
    axes.legend(fontsize=8)


def _bars(axes: Axes, values: Mapping[str, float], title: str) -> None:
    names = list(values)
    drawn = axes.barh(names, [values[name] for name in names])
    axes.bar_label(drawn, fmt="%.2f", fontsize=8, padding=2)
    axes.margins(x=0.2)
    axes.invert_yaxis()
    axes.set_title(title)
    axes.tick_params(axis="y", labelsize=8)


def _reuse(axes: Axes, found: Mapping[str, Any]) -> None:
    bins = range(1, 1 + len(found["reuse_error"]["mean"]))
    axes.plot(bins, found["reuse_error"]["mean"], marker="o", label="mean, relative to the step's")
    axes.plot(
        bins, found["reuse_error"]["variation"], marker="s", label="standard deviation / mean"
    )
    axes.set(title="figure 5b: error of reuse\nagainst score", xlabel="tenth of tokens by score")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def _similarity(axes: Axes, found: Mapping[str, Any]) -> None:
    axes.plot(range(1, 1 + len(found["similarity"])), found["similarity"], label="with step before")
    for count, points in found["same_time"].items():
        steps = [found["nearest_step"][count][index] for index in range(len(points))]
        axes.plot(steps, [cosine for _, cosine in points], "o", label=f"run of {count} steps")
    axes.set(title="figure 5c: cosine similarity\nof outputs", xlabel="step")
    axes.margins(y=0.6)  # room for the legend
    axes.legend(fontsize=8, loc="lower center")


def draw(found: Mapping[str, Any], file: Path) -> None:
    """Write the sheet as a PNG file."""
    figure = Figure(figsize=(15, 8.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 4).flatten()
    for axes, truth in zip(grid, found["recall"], strict=False):
        _recall(axes, found, truth)
    _reuse(grid[2], found)
    _similarity(grid[3], found)
    terms = found["terms"]
    _bars(grid[4], {n: one["psnr_db"] for n, one in terms.items()}, "figure 8, table 4: PSNR, dB")
    tokens = {n: one["tokens_share"] for n, one in terms.items()}
    _bars(grid[5], tokens, "tokens computed, of dense")
    quarter = {n: one["top_quarter_share"] for n, one in terms.items()}
    _bars(grid[6], quarter, "figure 5a: selections that go\nto a quarter of the tokens")
    never = {n: one["never_share"] for n, one in terms.items()}
    _bars(grid[7], never, "figure 5a: tokens that are\nnever selected")
    figure.suptitle(f"{found['model']} model, {found['pictures']} pictures, {found['steps']} steps")
    figure.savefig(file, format="png")
