"""Terminal: a report as rich tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from specdiff.inspect.graph import short_count
from specdiff.inspect.page import STEP_KINDS, pretty_formula, report_facts
from specdiff.inspect.report import Report
from specdiff.measure.machine import MachineRates

Row = tuple[object, ...]
LETTERS = {"dense": "█", "selective": "▄", "skipped": "·"}


def render(report: Report, rates: MachineRates | None = None, steps: int = 28) -> Group:
    """All of a report, for `rich.console.Console.print`."""
    return Group(*_parts(report, rates, steps))


def _parts(report: Report, rates: MachineRates | None, steps: int) -> Iterator[RenderableType]:
    if not report.selective:
        yield Text(str(report), style="yellow")
        return
    facts = report_facts(report, rates, steps)
    yield Text(f"can be run on some of its tokens; denoises {', '.join(report.latents)}")
    yield _table(
        "segments of tokens",
        ("input", "tokens", "may be left out"),
        [(s.name, s.length, "yes" if s.prunable else "no") for s in report.segments],
    )
    heads = ("kind", "regions", "ops", "FLOPs", "share", "left at 25 %", "cache")
    yield _table("regions", heads, [_region(row) for row in facts["kinds"]])
    whole: list[Row] = [(op.op, op.count, op.why, op.where or "-") for op in report.whole]
    whole = whole or [("nothing", "", "", "")]
    yield _table("left whole", ("op", "times", "why", "first in"), whole)
    yield _costs(facts["costs"], rates)
    yield from _formulas(report)
    yield from _schedule(report, rates, steps)


def _region(row: Mapping[str, Any]) -> Row:
    return (
        row["kind"],
        row["regions"],
        row["ops"],
        short_count(row["flops"], ""),
        f"{row['share']:.0%}",
        f"{row['left']:.0%}" if row["flops"] else "",
        short_count(row["cache"], "B") if row["cache"] else "",
    )


def _costs(rows: list[dict[str, float]], rates: MachineRates | None) -> Table:
    return _table(
        "cost of a step" + (", time at the rates of this machine" if rates else ""),
        ("left out", "tokens", "FLOPs", "less work", "bytes moved", "at least"),
        [
            (
                f"{row['ratio']:.0%}" if row["ratio"] else "dense",
                row["active"],
                short_count(row["flops"], ""),
                f"{row['gain']:.1f}x",
                short_count(row["moved"], "B"),
                f"{row['seconds'] * 1e3:.2f} ms" if rates else "",
            )
            for row in rows
        ],
    )


def _formulas(report: Report) -> Iterator[Text]:
    sizes = report.sizes
    yield Text(
        f"B = {sizes.batch} samples, N = {sizes.tokens}, T = {sizes.text}, K tokens computed"
    )
    for name, work in (("dense", report.dense_work), ("selective", report.selective_work)):
        yield Text(f"FLOPs {name}: {pretty_formula(work.flops)}")
        yield Text(f"bytes {name}: {pretty_formula(work.moved)}")
    yield Text(f"a step plan keeps at most {short_count(report.kept_bytes, 'B')} a generation")
    formula = pretty_formula(report.cache_formula)
    yield Text(f"caches: {short_count(report.cache_bytes, 'B')} a generation, {formula} bytes\n")


def _schedule(report: Report, rates: MachineRates | None, steps: int) -> Iterator[Text]:
    planned = report.schedule(steps)
    strip = Text(f"schedule of {steps} steps ({report.settings.method}): ")
    for kind, _, _ in planned:
        strip.append(LETTERS[kind], style=STEP_KINDS[kind][0])
    used = {kind for kind, _, _ in planned}
    strip.append("  " + ", ".join(f"{LETTERS[kind]} {kind}" for kind in LETTERS if kind in used))
    yield strip
    if rates:
        best = report.predict(rates, steps)
        times = f"at least {best.run:.3g} s, dense {best.dense_run:.3g} s"
        yield Text(f"a run: {times}: {best.speedup:.1f}x")


def _table(title: str, heads: tuple[str, ...], rows: list[Row]) -> Table:
    """A table; text is aligned to the left, figures to the right."""
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", collapse_padding=True)
    for position, head in enumerate(heads):
        figures = all(_is_figure(row[position]) for row in rows)
        table.add_column(head, justify="right" if figures else "left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    return table


def _is_figure(cell: object) -> bool:
    return isinstance(cell, int) or not str(cell) or str(cell)[0].isdigit()
