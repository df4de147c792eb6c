"""`specdiff explain`: what the compiler finds in a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specdiff.cli.common import console, make_folders, parse_options, write_figures

if TYPE_CHECKING:
    from specdiff.inspect.report import Report
    from specdiff.measure.machine import MachineRates


def explain(
    target: Annotated[
        str,
        typer.Argument(
            help="What to look at: demo, or package.module:function or file.py:function, a function"
            " that returns a model and a dict of its inputs."
        ),
    ] = "demo",
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of one picture.")] = 28,
    option: Annotated[
        list[str] | None, typer.Option(help="An option of the backend, as name=value; repeatable.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Where the page goes, as HTML.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Where the figures go, as JSON.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where the demo model is put.")] = "cpu",
) -> None:
    """Say what the compiler finds in a model, what steps cost and which would be skipped.

    Traces the model once and compiles nothing. Times are bounds by this machine's measured rates.
    """
    options = parse_options(option or [])
    make_folders([file for file in (html, json_file) if file is not None])
    from specdiff.inspect.page import report_page
    from specdiff.inspect.plain import to_json
    from specdiff.inspect.target import explain_call, load_target
    from specdiff.inspect.terminal import render
    from specdiff.measure.machine import usable_device
    from specdiff.models.subject import quiet_libraries

    quiet_libraries()
    call = load_target(target, usable_device(device))
    report = explain_call(call, options)
    rates = _rates_of(report)
    console.print(render(report, rates, steps))
    if html is not None:
        html.write_text(report_page(report, rates, steps, call.name), encoding="utf-8")
        console.print(f"page: {html}", highlight=False)
    if json_file is not None:
        write_figures(json_file, to_json(report, rates, steps))


def _rates_of(report: Report) -> MachineRates | None:
    """The rates of the device and type that the model has."""
    from specdiff.measure.machine import measure_rates

    if report.analysis is None:
        return None
    tokens = report.analysis.signature.tokens
    return measure_rates(tokens.device, tokens.dtype)
