"""`specdiff demo`: the same prompts drawn dense and with specdiff, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specdiff.cli.common import (
    console,
    errors,
    make_folders,
    parse_options,
    require_compiler,
    write_figures,
)

if TYPE_CHECKING:
    import torch

    from specdiff.measure.comparison import Comparison, Method
    from specdiff.models.subject import Request


def demo(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            help="What to draw; none: built-in prompts. Others need the extra named text."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=4, help="Denoising steps of one picture.")] = 28,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; then counted up.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds behind each median.")] = 3,
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("demo.png"),
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Where the figures go, as JSON.")
    ] = None,
    cache_ratio: Annotated[
        float | None,
        typer.Option(help="Share of tokens not computed between dense steps; 1: none is computed."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="Any other option, or a setting of Inductor for every method, as name=value;"
            " repeatable."
        ),
    ] = None,
    fewer_steps: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Also run the dense model for this many steps; repeatable."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Where a page that shows it all goes, as HTML.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1.")] = "cpu",
) -> None:
    """Draw prompts with the same model compiled dense and with specdiff, and compare.

    Writes one picture with the methods side by side and prints time, fidelity, tokens and memory.
    """
    ratio = [] if cache_ratio is None else [f"cache_ratio={cache_ratio}"]
    options = parse_options([*ratio, *(option or [])])
    require_compiler()
    make_folders([file for file in (out, json_file, report) if file is not None])
    from specdiff.measure.machine import usable_device
    from specdiff.measure.methods import DemoRun, demo_methods, demo_requests
    from specdiff.measure.summary import load_per_core, record, warnings
    from specdiff.models.subject import emoji, quiet_libraries

    quiet_libraries()
    place = usable_device(device)
    subject, requests = emoji(place), demo_requests(prompts or [], seed)
    subject.embed(requests)
    load = load_per_core()
    methods = demo_methods(DemoRun(subject, steps, options), fewer_steps or [])
    comparison = _measure(methods, requests, repeats)
    hints = warnings(comparison, load)
    _show(comparison, hints, out)
    if json_file is not None:
        write_figures(json_file, record(comparison, place, repeats, load))
    if report is not None:
        _write_page(report, place, options, comparison, hints)


def _show(comparison: Comparison, hints: Sequence[str], out: Path) -> None:
    """The picture, and on the terminal the table and what to know of it."""
    from specdiff.inspect.picture import draw_comparison
    from specdiff.measure.summary import table

    draw_comparison(comparison, out)
    console.print(table(comparison))
    for hint in hints:
        errors.print(hint, style="yellow", markup=False, highlight=False)
    console.print(f"picture: {out}", highlight=False)


def _write_page(
    file: Path,
    place: torch.device,
    options: Mapping[str, object],
    comparison: Comparison,
    hints: Sequence[str],
) -> None:
    """The comparison, recorded runs and what the compiler found, as one page."""
    from specdiff.inspect.runs import comparison_page
    from specdiff.inspect.target import demo_call, explain_call
    from specdiff.measure.machine import measure_rates
    from specdiff.measure.methods import record_methods

    methods = [trials.method for trials in comparison.trials]
    runs = record_methods(methods, comparison.requests)
    call = demo_call(place)
    report = explain_call(call, options)
    rates = measure_rates(place)
    file.write_text(comparison_page(comparison, report, runs, rates, hints), encoding="utf-8")
    console.print(f"page: {file}", highlight=False)


def _measure(methods: list[Method], requests: list[Request], repeats: int) -> Comparison:
    """Compare the methods behind a progress bar."""
    from specdiff.measure.comparison import compare, count_images
    from specdiff.measure.progress import progress_bar

    total = count_images(methods, requests, repeats)
    with progress_bar(console, total) as update:
        # The bar counts finished pictures, and is told when one begins: one behind.
        update(completed=-1)
        result = compare(
            methods, requests, repeats, lambda text: update(advance=1, description=text)
        )
        update(completed=total, description="done")
    return result
