"""The frontier: speedup against closeness to the dense run, to the solution, and in features."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from specdiff.evaluation.findings import (
    FEATURES,
    PSNR,
    SOLUTION,
    SPEEDUP,
    WORST,
    Findings,
    frontier,
)

MARKERS = "os^Dv<>Ph*Xd"
OURS = "specdiff"
LABELS = {
    PSNR: "PSNR to the dense run, dB (higher is closer)\nlines down: mean of the worst tenth",
    SOLUTION: "PSNR to the solution, dB (higher is closer)\nlines down: mean of the worst tenth",
    FEATURES: "distance in deep features (lower is closer)",
}


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
    worst = measure + WORST
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
        for one in own:
            if one.values.get(worst) is not None:
                ends = one.values[worst], one.values[measure]
                axes.vlines(one.values[SPEEDUP], *ends, color=f"C{index % 10}", alpha=0.4)
    faster = [one.values[measure] for one in points.values() if one.values[SPEEDUP] > 1]
    if faster:  # what is no faster than dense may be equal to it, far away from all others
        margin = 0.05 * (max(faster) - min(faster)) or 1.0
        axes.set_ylim(min(faster) - margin, max(faster) + margin)
    axes.set(xlabel=f"speedup over dense, compiled ({findings.terms.clock} time)", ylabel=label)
    axes.grid(alpha=0.3)


def frontier_figure(findings: Findings) -> Figure:
    """The plots side by side; that of the solution where anything was compared with it."""
    shown = [PSNR, *([SOLUTION] if findings.rivals(SPEEDUP, SOLUTION) else []), FEATURES]
    figure = Figure(figsize=(6.5 * len(shown), 5.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    every: list[Axes] = list(figure.subplots(1, len(shown)))
    for axes, measure in zip(every, shown, strict=True):
        _draw(axes, findings, measure, LABELS[measure], higher=measure != FEATURES)
    every[-1].invert_yaxis()
    handles, labels = every[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9)
    terms, places = findings.terms, findings.environments
    drawn, timed = (places.get(phase, {}).get("device", "") for phase in ("draw", "time"))
    figure.suptitle(
        f"{terms.model} model, {terms.steps} steps, {terms.pictures} pictures"
        f" (drawn: {drawn}, timed: {timed}): up and to the right is better"
    )
    return figure


def draw_frontier(findings: Findings, file: Path) -> None:
    """Write the plots as a PNG file."""
    frontier_figure(findings).savefig(file, format="png")
