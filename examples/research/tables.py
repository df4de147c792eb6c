"""What it saves to look shifts, scales and gates up by timestep: selective steps with and without.

    python examples/research/tables.py flux-cpu --ratio 0.95 --ratio 0.99 --out tables.json

Both take turns in one process, a dense step after each round; medians. On a GPU: `--device cuda
--mode reduce-overhead`, and a `--depth` if compiling takes too long.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from specdiff import torch_adapter
from specdiff.bench.geometries import build
from specdiff.bench.measure import (
    TimedPrograms,
    Trial,
    analysed,
    compiled,
    run,
    runtime_of,
    type_of,
)
from specdiff.compiler import lowered_programs
from specdiff.measure.machine import usable_device
from specdiff.measure.summary import environment
from specdiff.measure.timing import timed
from specdiff.models.subject import quiet_libraries
from specdiff.options import Options
from specdiff.oracles.checks import random_active
from specdiff.passes.select.signature import cache_slots
from specdiff.pipeline import Analysis
from specdiff.program import Evaluation

WARMUP = 3
"""Rounds that are not counted: compiling, recording of CUDA graphs."""


class Inputs(TimedPrograms):
    """Programs that keep the inputs of the latest dense step."""

    def dense(self, inputs: Sequence[object], caches: Sequence[Tensor]) -> Evaluation:
        """As `Programs.dense`."""
        self.inputs = [v.clone() if isinstance(v, Tensor) else v for v in inputs]
        return super().dense(inputs, caches)


def computed(found: Analysis) -> Analysis:
    """The same with nothing looked up by timestep: a selective step computes it."""
    selection = replace(found.selection, timetable=None).with_needs()
    signature = replace(found.signature, caches=cache_slots(selection), tabulated_from=None)
    return replace(found, selection=selection, signature=signature)


def works(
    found: Analysis, inputs: Sequence[Any], active: Tensor, row: int | None, settings: Any
) -> dict[str, Callable[[], object]]:
    """What is to be timed of one analysis, by name."""
    programs = lowered_programs(found, Options(), settings)
    caches = [slot.allocate() for slot in found.signature.caches]
    wanted: dict[str, Callable[[], object]] = {
        "dense": lambda: programs.dense(inputs, caches),
        "selective": lambda: programs.selective(inputs, caches, active, True, False, row),
        "without text": lambda: programs.selective(inputs, caches, active, False, False, row),
    }
    if row is not None:
        time = found.signature.time_input(inputs)
        wanted["filling one row"] = lambda: programs.tabulate(inputs, caches)
        wanted["filling all rows"] = lambda: programs.tabulate(inputs, caches, [time])
    return wanted


def main(
    geometry: Annotated[str, typer.Argument(help="As of `specdiff bench`.")] = "flux-cpu",
    depth: Annotated[float, typer.Option(help="Share of the model's blocks.")] = 1.0,
    ratio: Annotated[list[float] | None, typer.Option(help="Cache ratio, repeatable.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    mode: Annotated[str | None, typer.Option(help="Of torch.compile.")] = None,
    rounds: Annotated[int, typer.Option(help="Behind each median.")] = 30,
    out: Annotated[Path | None, typer.Option(help="A JSON file.")] = None,
) -> None:
    """Time both."""
    quiet_libraries()
    place, settings = usable_device(device), torch_adapter.mode_settings(mode)
    sampler = build(geometry, place, type_of(None, place), 4, depth)
    trial = Trial(
        0.95, compiled(sampler, "specdiff", {"method": "paper", "inner_backend": "eager"})
    )
    run(sampler, trial)
    runtime = runtime_of(trial)
    runtime.programs = kept = Inputs(runtime.programs)
    run(sampler, trial)
    tables = analysed(sampler)
    figures = []
    with torch.no_grad():
        for one in ratio or [0.95]:
            count = round((1 - one) * tables.signature.prunable_tokens)
            active = random_active(tables.signature.batch, tables.signature.lengths, count, place)
            both = {
                "looked up": works(tables, kept.inputs, active, 0, settings),
                "computed": works(computed(tables), kept.inputs, active, None, settings),
            }
            seconds: dict[str, list[float]] = defaultdict(list)
            for number in range(WARMUP + rounds):
                for how, named in both.items():
                    for name, work in named.items():
                        took = timed(work, place)[1]
                        if number >= WARMUP:
                            seconds[f"{name}, {how}"].append(took)
            found = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
            figures.append({"ratio": one, "milliseconds": found})
            for name, value in found.items():
                Console().print(f"{one:g} {name}: {value:.2f} ms")
    if out is not None:
        record = {"environment": environment(place), "geometry": geometry, "depth": depth}
        record |= {"mode": mode, "rounds": rounds, "figures": figures}
        out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
