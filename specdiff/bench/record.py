"""The figures of a bench: as a JSON record, and as a Markdown table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from specdiff.bench.measure import BenchResult, Program, Trial, label
from specdiff.measure.memory import MEBIBYTE
from specdiff.measure.summary import Json, environment, plain

SCHEMA = 1
"""Number of the record's layout; grows when a field changes its meaning or goes away."""


def record(
    name: str, bench: BenchResult, options: Mapping[str, Any], load: float
) -> dict[str, Json]:
    """Everything measured, as a value that `json.dump` takes; times are seconds.

    Args:
        name: of the geometry.
        bench: what was measured.
        options: of specdiff on top of each ratio, and of `torch.compile`.
        load: of the machine before, a core.
    """
    sampler = bench.sampler
    return {
        "schema": SCHEMA,
        "environment": environment(sampler.noise.device),
        "load_per_core_before": round(load, 2),
        "geometry": {"name": name, **asdict(sampler.geometry)},
        "dtype": str(sampler.noise.dtype).removeprefix("torch."),
        "steps": sampler.steps,
        "options": plain(options),
        "rates": {name: float(f"{rate:.4g}") for name, rate in asdict(bench.rates).items()},
        "methods": [_method(bench, trial) for trial in bench.trials],
    }


def _method(bench: BenchResult, trial: Trial) -> dict[str, Json]:
    return {
        "name": label(trial),
        "cache_ratio": trial.ratio,
        "seconds": [round(second, 4) for second in trial.seconds],
        "seconds_median": round(trial.median, 4),
        "speedup": round(bench.speedup(trial), 3),
        "first_seconds": round(trial.first_seconds, 2),
        "peak_bytes": trial.peak_bytes,
        "cache_bytes": trial.cache_bytes,
        "programs": [_program(program) for program in trial.programs],
    }


def _program(program: Program) -> dict[str, Json]:
    return {
        "name": program.name,
        "calls": program.calls,
        "seconds_median": round(program.seconds, 6),
        "floor_seconds": None if program.floor is None else round(program.floor, 6),
        "compile_seconds": round(program.compile_seconds, 2),
    }


def markdown(figures: Mapping[str, Any]) -> str:
    """A record as a page: where it ran, a table of runs and one of programs."""
    methods = figures["methods"]
    runs = ("method", "run", "speedup", "first run", "peak memory", "caches")
    programs = ("program", "ratio", "time", "floor", "time / floor", "compiled in")
    lines = [
        *_heading(figures),
        "",
        *_rows(runs, [_method_row(method) for method in methods]),
        "",
        *_rows(programs, _program_rows(methods)),
    ]
    return "\n".join(lines) + "\n"


def _heading(figures: Mapping[str, Any]) -> list[str]:
    """What was measured, and where."""
    machine, rates = figures["environment"], figures["rates"]
    matrix, copy = rates["flops_per_second"] / 1e9, rates["bytes_per_second"] / 1e9
    where = machine["device"] if machine["device"] != "cpu" else f"{machine['threads']} CPU threads"
    options = ", ".join(f"{name}={value}" for name, value in figures["options"].items())
    return [
        f"## {figures['geometry']['name']}",
        "",
        f"{where}, {figures['dtype']}, torch {machine['torch']}, diffusers {machine['diffusers']},"
        f" {machine['date'][:10]}; {figures['steps']} steps, medians of"
        f" {len(figures['methods'][0]['seconds'])} runs taking turns; {options}.",
        f"Matrix products {matrix:.0f} GFLOP/s, copies {copy:.1f} GB/s.",
    ]


def _method_row(method: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        method["name"],
        f"{method['seconds_median']:.2f} s",
        f"{method['speedup']:.2f}x",
        f"{method['first_seconds']:.0f} s",
        _mebibytes(method["peak_bytes"]),
        _mebibytes(method["cache_bytes"]),
    )


def _program_rows(methods: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each program; programs that all ratios share appear once."""
    rows: list[tuple[str, ...]] = []
    listed: set[str] = set()
    for method in methods:
        for program in method["programs"]:
            if program["name"] in listed:
                continue
            listed.add(program["name"])
            seconds, floor = program["seconds_median"], program["floor_seconds"]
            rows.append(
                (
                    program["name"],
                    f"{method['cache_ratio']:g}" if "_" in program["name"] else "",
                    f"{seconds * 1e3:.1f} ms",
                    f"{floor * 1e3:.1f} ms" if floor else "",
                    f"{seconds / floor:.2f}" if floor else "",
                    f"{program['compile_seconds']:.1f} s",
                )
            )
    return rows


def _rows(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *rows)]


def _mebibytes(count: int | None) -> str:
    return f"{count / MEBIBYTE:.0f} MiB" if count else ""
