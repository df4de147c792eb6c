"""`specdiff bench`: random models of known sizes against the clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from specdiff.cli.common import console, make_folders, parse_options, require_compiler
from specdiff.errors import OptionError

RATIOS = (0.5, 0.75, 0.85, 0.92, 0.95, 0.99)


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
    from specdiff.measure.machine import measure_rates, usable_device
    from specdiff.measure.summary import load_per_core
    from specdiff.models.subject import quiet_libraries
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
        measured = measure(sampler, rates, ratio or RATIOS, repeats, options, mode, console.log)
        figures = record(name, measured, {"mode": mode, **options}, load)
        (out / f"{name}.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        (out / f"{name}.md").write_text(markdown(figures), encoding="utf-8")
        console.print(markdown(figures), markup=False, highlight=False, soft_wrap=True)
