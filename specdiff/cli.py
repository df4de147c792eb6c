"""The command line, `specdiff demo` and others. Commands only wire modules."""

from __future__ import annotations

import ast
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ModuleNotFoundError as missing:
    raise SystemExit(
        f'{missing.name} is missing: the command line needs pip install "specdiff[demo]"'
    ) from None

import specdiff
from specdiff.errors import OptionError, SpecdiffError
from specdiff.evaluation.cli import evaluate_methods, tune_plan

if TYPE_CHECKING:
    from specdiff.comparison import Comparison, Method, Request
    from specdiff.machine import MachineRates
    from specdiff.methods import Setting
    from specdiff.report import Report

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()
errors = Console(stderr=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(specdiff.__version__, highlight=False)
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    """Run diffusion transformers on the tokens that matter."""


def parse_options(pairs: Sequence[str]) -> dict[str, object]:
    """Read `name=value` pairs; values are Python literals where they can be, else text.

    Raises:
        OptionError: A pair has no `=`, or neither specdiff nor Inductor takes it.
    """
    from specdiff.options import Options
    from specdiff.torch_adapter import inductor_keys

    options: dict[str, object] = {}
    for pair in pairs:
        name, separator, text = (part.strip() for part in pair.partition("="))
        if not separator:
            raise OptionError(f"expected name=value, got {pair!r}")
        try:
            options[name] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            options[name] = text
    Options.parse(options, inductor_keys())
    return options


def require_compiler() -> None:
    """Say what is missing before Inductor does, a minute later and in more words."""
    compiler = os.environ.get("CXX", "g++")
    if sys.platform == "linux" and shutil.which(compiler) is None:
        raise SpecdiffError(f"torch.compile needs a C++ compiler and found no {compiler}")


def make_folders(files: Sequence[Path]) -> None:
    """Make room for the results before minutes of work go into them."""
    for file in files:
        if file.is_dir():
            raise SpecdiffError(f"{file} is a folder, expected a file name")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            is_new = not file.exists()
            file.open("ab").close()  # permissions alone do not tell, root has them all
            if is_new:
                file.unlink()
        except OSError as error:
            raise SpecdiffError(f"cannot write {file}: {error}") from error


def _measure(methods: list[Method], requests: list[Request], repeats: int) -> Comparison:
    """Compare the methods behind a progress bar."""
    from specdiff.comparison import compare, count_images

    text = TextColumn("{task.description}", markup=False)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), text)
    with Progress(*columns, console=console) as progress:
        total = count_images(methods, requests, repeats)
        # The bar counts finished pictures, and is told when one begins: one behind.
        task = progress.add_task("loading", total=total, completed=-1)
        result = compare(
            methods,
            requests,
            repeats,
            lambda text: progress.update(task, advance=1, description=text),
        )
        progress.update(task, completed=total, description="done")
    return result


@app.command()
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
    from specdiff.methods import (
        Setting,
        demo_methods,
        demo_requests,
        embed,
        quiet_libraries,
        usable_device,
    )
    from specdiff.summary import load_per_core, record, warnings

    quiet_libraries()
    place = usable_device(device)
    requests = demo_requests(prompts or [], seed)
    setting = Setting(place, steps, options, embed(requests, place))
    load = load_per_core()
    comparison = _measure(demo_methods(setting, fewer_steps or []), requests, repeats)
    hints = warnings(comparison, load)
    _show(comparison, hints, out)
    if json_file is not None:
        _write_figures(json_file, record(comparison, place, repeats, load))
    if report is not None:
        _write_page(report, setting, comparison, hints)


def _show(comparison: Comparison, hints: Sequence[str], out: Path) -> None:
    """The picture, and on the terminal the table and what to know of it."""
    from specdiff.picture import draw_comparison
    from specdiff.summary import table

    draw_comparison(comparison, out)
    console.print(table(comparison))
    for hint in hints:
        errors.print(hint, style="yellow", markup=False, highlight=False)
    console.print(f"picture: {out}", highlight=False)


def _write_figures(file: Path, figures: object) -> None:
    text = json.dumps(figures, indent=2, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8")
    console.print(f"figures: {file}", highlight=False)


def _write_page(file: Path, setting: Setting, comparison: Comparison, hints: Sequence[str]) -> None:
    """The comparison, recorded runs and what the compiler found, as one page."""
    from specdiff.inspect.runs import comparison_page
    from specdiff.inspect.target import demo_call, explain_call
    from specdiff.machine import measure_rates
    from specdiff.methods import record_methods

    methods = [trials.method for trials in comparison.trials]
    runs = record_methods(methods, comparison.requests)
    call = demo_call(setting.device)
    found = explain_call(call, setting.options)
    rates = measure_rates(setting.device)
    file.write_text(comparison_page(comparison, found, runs, rates, hints), encoding="utf-8")
    console.print(f"page: {file}", highlight=False)


@app.command()
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
    from specdiff.methods import quiet_libraries, usable_device

    quiet_libraries()
    call = load_target(target, usable_device(device))
    found = explain_call(call, options)
    rates = _rates_of(found)
    console.print(render(found, rates, steps))
    if html is not None:
        html.write_text(report_page(found, rates, steps, call.name), encoding="utf-8")
        console.print(f"page: {html}", highlight=False)
    if json_file is not None:
        _write_figures(json_file, to_json(found, rates, steps))


def _rates_of(found: Report) -> MachineRates | None:
    """The rates of the device and type that the model has."""
    from specdiff.machine import measure_rates

    if found.analysis is None:
        return None
    tokens = found.analysis.signature.tokens
    return measure_rates(tokens.device, tokens.dtype)


RATIOS = (0.5, 0.75, 0.85, 0.92, 0.95, 0.99)


@app.command()
def bench(
    geometries: Annotated[
        list[str], typer.Argument(help="flux-dev, sd3-medium, sd35-large; flux-cpu, sd3-cpu.")
    ],
    ratio: Annotated[
        list[float] | None,
        typer.Option(min=0.01, max=0.99, help="Cache ratio, repeatable; none: six from 0.5."),
    ] = None,
    steps: Annotated[int, typer.Option(min=4, help="Denoising steps of one run.")] = 28,
    depth: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the model's blocks.")
    ] = 1.0,
    repeats: Annotated[int, typer.Option(min=1, help="Runs behind each median.")] = 3,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="Any option of specdiff but the ratio, or a setting of Inductor for every method,"
            " as name=value; repeatable."
        ),
    ] = None,
    mode: Annotated[str | None, typer.Option(help="Of torch.compile, for every method.")] = None,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights; none: bfloat16, on a CPU float32.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for a .json and a .md each.")] = Path("bench"),
) -> None:
    """Time random models of known sizes, dense and with specdiff, beside what the machine allows.

    The method is "paper", whose every later step is selective, unless an option says otherwise.
    """
    options = {"method": "paper", **parse_options(option or [])}
    if "cache_ratio" in options:
        raise OptionError("cache_ratio: the ratios take its place, give --ratio")
    require_compiler()
    from specdiff.bench.geometries import build, require_known
    from specdiff.bench.measure import measure, type_of
    from specdiff.bench.record import markdown, record
    from specdiff.machine import measure_rates
    from specdiff.methods import quiet_libraries, usable_device
    from specdiff.summary import load_per_core
    from specdiff.torch_adapter import mode_settings

    mode_settings(mode)
    require_known(geometries)
    place = usable_device(device)
    kind = type_of(dtype, place)
    quiet_libraries()
    make_folders([out / "bench.json"])
    for name in geometries:
        load, sampler = load_per_core(), build(name, place, kind, steps, depth)
        rates = measure_rates(place, kind)
        found = measure(sampler, rates, ratio or RATIOS, repeats, options, mode, console.log)
        figures = record(name, found, {"mode": mode, **options}, load)
        (out / f"{name}.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        (out / f"{name}.md").write_text(markdown(figures), encoding="utf-8")
        console.print(markdown(figures), markup=False, highlight=False, soft_wrap=True)


app.command("eval")(evaluate_methods)
app.command("tune")(tune_plan)


def main() -> None:
    """Entry point of the `specdiff` command: 0 when done, 2 on an error of the caller's."""
    try:
        app()
    except SpecdiffError as error:
        # Not markup: messages name extras in square brackets.
        errors.print(
            "error:", str(error), style="red", markup=False, highlight=False, soft_wrap=True
        )
        sys.exit(2)
