"""The findings as a table in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from specdiff.evaluation.findings import (
    EACH,
    FEATURES,
    FLOPS,
    LOWEST,
    PSNR,
    SOLUTION,
    SPEEDUP,
    WORST,
    Finding,
    Findings,
    frontier,
)
from specdiff.evaluation.method import SOLVED
from specdiff.measure.memory import MEBIBYTE

Cell = Callable[[Mapping[str, Any]], str]


def _number(name: str, form: str) -> Cell:
    def cell(values: Mapping[str, Any]) -> str:
        value = values.get(name)
        return "" if value is None else form.format(value)

    return cell


def _psnr(values: Mapping[str, Any]) -> str:
    if PSNR not in values:
        return ""
    return "equal" if values[PSNR] is None else f"{values[PSNR]:.1f}"


def _tenth_percentile(values: Mapping[str, Any]) -> str:
    each = values.get(PSNR + EACH)
    if not each or None in each:
        return ""
    return f"{np.percentile(each, 10):.1f}"


def _peak(values: Mapping[str, Any]) -> str:
    peak = values.get("peak_bytes")
    return "" if peak is None else f"{peak / MEBIBYTE:.0f}"


COLUMNS: Mapping[str, Cell] = {
    "speedup": _number(SPEEDUP, "{:.2f}x"),
    "FLOPs": _number(FLOPS, "{:.0%}"),
    "PSNR, dB": _psnr,
    "10th percentile": _tenth_percentile,
    "worst tenth": _number(PSNR + WORST, "{:.1f}"),
    "lowest": _number(PSNR + LOWEST, "{:.1f}"),
    "to the solution, dB": _number(SOLUTION, "{:.1f}"),
    "its worst tenth": _number(SOLUTION + WORST, "{:.1f}"),
    "SSIM": _number("ssim", "{:.3f}"),
    "features": _number(FEATURES, "{:.3f}"),
    "latent": _number("latent_error", "{:.3f}"),
    "sets": _number("kernel_distance", "{:.4f}"),
    "recognised": _number("recognised", "{:.0%}"),
    "peak, MiB": _peak,
}
"""Heading and content, in order; columns that nothing fills are left out."""


def markdown(findings: Findings) -> str:
    """One row a method in the order measured; in bold what none beats in speedup and PSNR both."""
    shown = {name: one for name, one in findings.methods.items() if one.family != SOLVED}
    measured = {name: one for name, one in shown.items() if not one.reason}
    headings = [
        heading
        for heading, cell in COLUMNS.items()
        if any(cell(finding.values) for finding in measured.values())
    ]
    best = set(frontier(findings, PSNR, higher_is_better=True))
    lines = [
        "| " + " | ".join(["method", *headings]) + " |",
        "|" + "---|" * (len(headings) + 1),
        *(_row(name, finding, headings, name in best) for name, finding in measured.items()),
    ]
    refused = {name: one.reason for name, one in findings.methods.items() if one.reason}
    if refused:
        lines += ["", "Not measured:", ""]
        lines += [f"- {', '.join(names)}: {reason}" for reason, names in _by_reason(refused)]
    return "\n".join(lines) + "\n"


def _row(name: str, finding: Finding, headings: list[str], is_best: bool) -> str:
    shown = f"**{name}**" if is_best else name
    return "| " + " | ".join([shown, *(COLUMNS[h](finding.values) for h in headings)]) + " |"


def _by_reason(refused: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    grouped: dict[str, list[str]] = {}
    for name, reason in refused.items():
        grouped.setdefault(reason, []).append(name)
    return list(grouped.items())
