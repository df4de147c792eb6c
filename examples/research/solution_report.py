"""Tables and plot of `solution.py`."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from matplotlib.figure import Figure

from specdiff.measure.comparison import worst_tenth

STEPS = 28
FEWER = (6, 8, 10, 12, 15, 20, 28)
"""Evaluations that are measured."""
RANGE = 15
"""Decibels below the dense run that the plot shows."""
Known = dict[str, dict[str, dict[str, float]]]
"""model, then "method, evaluations", then picture: PSNR"""


QUALITY, COUNT = "quality", "evaluations"
"""In keys: closeness by a quality, and what it computed."""


def key_of(method: str, amount: float | str) -> str:
    """Of a row of results."""
    return f"{method}, {amount}" if isinstance(amount, str) else f"{method}, {amount:g}"


def made_by(script: str) -> str:
    """The line that says how a page came about."""
    version = torch.__version__.partition("+")[0]
    return (
        f"`python examples/research/{script}`, {datetime.date.today():%d %B %Y}, torch {version},"
        f" one CPU core, float32, {STEPS} steps."
    )


def solvers_of(known: Known) -> list[str]:
    """The rivals."""
    names = {key.rpartition(", ")[0] for rows in known.values() for key in rows}
    names -= {QUALITY, COUNT}
    return sorted(name for name in names if not name.startswith("specdiff"))


def table(known: Known, model: str) -> str:
    """A row for each method, a column for each number of evaluations."""
    found: dict[str, dict[int, list[float]]] = {}
    for key, values in known[model].items():
        method, _, count = key.rpartition(", ")
        if method not in (QUALITY, COUNT):
            found.setdefault(method, {})[int(count)] = [*values.values()]
    counts = sorted({count for row in found.values() for count in row})
    usual = len(known[model][key_of("Euler", STEPS)])
    lines = ["| | " + " | ".join(map(str, counts)) + " |", "|" + "---|" * (len(counts) + 1)]
    for method in sorted(found, key=_place):
        cells = [_cell(found[method].get(count, []), usual) for count in counts]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _place(method: str) -> tuple[bool, str]:
    """Specdiff first."""
    return not method.startswith("specdiff"), method


def _cell(values: list[float], usual: int) -> str:
    if not values:
        return ""
    fewer = f" ({len(values)})" if len(values) != usual else ""
    return f"{statistics.fmean(values):.1f}, {worst_tenth(values):.1f}{fewer}"


def gains(known: Known, model: str) -> str:
    """By how much `target="solution"` is closer than the dense run, and than the best solver."""
    heading = (
        "| evaluations | than the dense run | pictures | than the best solver measured | pictures |"
    )
    lines = [heading, "|---|---|---|---|---|"]
    for count in FEWER:
        ours, *rivals = (
            known[model].get(key_of(method, count), {})
            for method in ("specdiff, solution", *solvers_of(known))
        )
        dense = known[model][key_of("Euler", STEPS)]
        if ours:
            lines.append(f"| {count} | {_gain(ours, [dense])} | {_gain(ours, rivals)} |")
    return "\n".join(lines)


def _gain(ours: dict[str, float], rivals: list[dict[str, float]]) -> str:
    """In the mean and the worst tenth, each against the rival that is best in it; and pictures.

    Each rival counts on the pictures that it was measured on.
    """
    shared = [[index for index in ours if index in rival] for rival in rivals]
    pairs = [(rival, common) for rival, common in zip(rivals, shared, strict=True) if common]
    if not pairs:
        return " | "
    measures: tuple[Callable[[list[float]], float], ...] = (statistics.fmean, worst_tenth)
    differences = [
        min(
            of([ours[i] for i in common]) - of([rival[i] for i in common])
            for rival, common in pairs
        )
        for of in measures
    ]
    counts = sorted({len(common) for _, common in pairs})
    said = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    return ", ".join(f"{each:+.1f}" for each in differences) + f" | {said}"


def qualities(known: Known, model: str) -> str:
    """What the qualities compute, and how close they come; empty if none was measured."""
    dense = known[model][key_of("Euler", STEPS)]
    lines = [
        "| quality | evaluations | PSNR, dB | than the dense run | pictures |",
        "|---|---|---|---|---|",
    ]
    for key, found in known[model].items():
        kind, _, quality = key.partition(", ")
        if kind == QUALITY:
            count = statistics.fmean(known[model][key_of(COUNT, quality)].values())
            cell = _cell([*found.values()], len(found))
            lines.append(f"| {quality} | {count:.1f} | {cell} | {_gain(found, [dense])} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def report(known: Known) -> str:
    """The page of the tables."""
    parts = [
        "# How close to the solution",
        "`python examples/research/solution.py`, "
        f"{datetime.date.today():%d %B %Y}, torch {torch.__version__.partition('+')[0]},"
        f" diffusers {diffusers.__version__}, one CPU core, float32.",
        "PSNR to the solution of the sampling equation (150 steps of Adams-Bashforth 2), dB: mean"
        " and mean of the worst tenth, by evaluations of the model. specdiff runs under Euler's 28"
        " steps; the others take as many steps of their own. None of the pictures was tuned on.",
        'In "specdiff, solution" at 28 nothing is skipped: it costs what the dense run does, which'
        " is Euler at 28.",
        "![Closeness by evaluations](solution.png)",
    ]
    for model in known:
        usual = len(known[model][key_of("Euler", STEPS)])
        parts += [f"## {model}, {usual} pictures, or as many as are in brackets"]
        parts += [table(known, model)]
        parts += ['How much closer `target="solution"` is, dB:', gains(known, model)]
        if rows := qualities(known, model):
            parts += ["By quality, which computes more where forecasts miss much:", rows]
    return "\n\n".join(parts) + "\n"


def draw_plot(known: Known, file: Path) -> None:
    """Closeness by evaluations: means as lines, worst tenths as dots; of all pictures alone."""
    methods = ["specdiff, solution", *solvers_of(known)]
    figure = Figure(figsize=(4.5 * len(known), 3.4), dpi=90, layout="constrained")
    every = figure.subplots(1, len(known), squeeze=False)[0]
    for axes, (model, found) in zip(every, known.items(), strict=True):
        usual = len(found[key_of("Euler", STEPS)])
        for method in sorted(methods, key=_place):
            points = [(n, [*found.get(key_of(method, n), {}).values()]) for n in FEWER]
            points = [(n, values) for n, values in points if len(values) == usual]
            if len(points) < 2:
                continue  # measured on some of the pictures
            means = [statistics.fmean(values) for _, values in points]
            counts, ours = [n for n, _ in points], method == "specdiff, solution"
            (line,) = axes.plot(counts, means, "o-", ms=4, lw=2.5 if ours else 1, label=method)
            worst = [worst_tenth(values) for _, values in points]
            axes.plot(counts, worst, ".", ms=4, color=line.get_color())
        dense = statistics.fmean(found[key_of("Euler", STEPS)].values())
        axes.axhline(dense, color="0.5", ls="--", lw=1, label="dense run, Euler's 28 steps")
        axes.set(title=model, xlabel="evaluations", ylim=(dense - RANGE, None))
        axes.grid(alpha=0.3)
    every[0].set_ylabel("PSNR to the solution, dB")
    handles, labels = every[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    figure.savefig(file)
