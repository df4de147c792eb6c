"""The frontier: speedup against PSNR and against the distance in deep features."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from specdiff.evaluation.findings import FEATURES, PSNR, SPEEDUP, Findings, frontier

MARKERS = "os^Dv<>Ph*Xd"
OURS = "specdiff"


def _families(findings: Findings) -> list[str]:
    """In one order for both plots, so that a colour means the same in both."""
    return list(dict.fromkeys(finding.family for finding in findings.rivals(SPEEDUP).values()))


def _draw(axes: Axes, findings: Findings, measure: str, label: str, *, higher: bool) -> None:
    points = findings.rivals(SPEEDUP, measure)
    best = [points[name] for name in frontier(findings, measure, higher_is_better=higher)]
    axes.plot(
        [one.values[SPEEDUP] for one in best],
        [one.values[measure] for one in best],
        color="0.75", linewidth=6, zorder=0, solid_capstyle="round", label="best of all",
    )  # fmt: skip
    for index, family in enumerate(_families(findings)):
        own = [one for one in points.values() if one.family == family]
        own.sort(key=lambda one: float(one.values[SPEEDUP]))
        is_ours = family.startswith(OURS)
        axes.plot(
            [one.values[SPEEDUP] for one in own],
            [one.values[measure] for one in own],
            marker=MARKERS[index % len(MARKERS)], color=f"C{index % 10}", label=family,
            linewidth=2.2 if is_ours else 1.0, markersize=8 if is_ours else 5,
        )  # fmt: skip
    faster = [one.values[measure] for one in points.values() if one.values[SPEEDUP] > 1]
    if faster:  # what is no faster than dense may be equal to it, far away from all others
        margin = 0.05 * (max(faster) - min(faster)) or 1.0
        axes.set_ylim(min(faster) - margin, max(faster) + margin)
    axes.set(xlabel=f"speedup over dense, compiled ({findings.terms.clock} time)", ylabel=label)
    axes.grid(alpha=0.3)


def frontier_figure(findings: Findings) -> Figure:
    """Both plots side by side."""
    figure = Figure(figsize=(13, 5.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw(left, findings, PSNR, "PSNR against dense, dB (higher is closer)", higher=True)
    _draw(right, findings, FEATURES, "distance in deep features (lower is closer)", higher=False)
    right.invert_yaxis()
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9)
    terms, places = findings.terms, findings.environments
    drawn, timed = (places.get(phase, {}).get("device", "") for phase in ("draw", "time"))
    figure.suptitle(
        f"{terms.model} model, {terms.steps} steps, {terms.pictures} pictures"
        f" (drawn: {drawn}, timed: {timed}): up and to the right is better"
    )
    return figure


def draw_frontier(findings: Findings, file: Path) -> None:
    """Write both plots as a PNG file."""
    frontier_figure(findings).savefig(file, format="png")
