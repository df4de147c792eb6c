"""The presets, in time and memory, on models of known sizes with random weights.

    python examples/bench/presets.py --device cuda --seconds 480 --out presets.json
    python examples/bench/presets.py flux-cpu sd3-cpu --device cpu --rounds 2

Of each geometry: the dense model and specdiff's presets, all compiled, and cache-dit with compiled
blocks where it is installed. They take turns; medians. `NAME:SHARE` cuts the depth. Geometries that
the time no longer allows are left out, and the table says so. Random weights say nothing of
pictures, nor of which steps a cache that decides by values would skip: cache-dit is forced to
recompute every third step, as "balanced" does about.

No figures of a GPU are committed yet: none was lent since these presets are the default.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import specdiff
from specdiff.bench.geometries import Sampler, build
from specdiff.bench.measure import type_of
from specdiff.measure.machine import usable_device
from specdiff.measure.memory import peak, reset_peak
from specdiff.measure.summary import environment
from specdiff.measure.timing import in_turns
from specdiff.settings import QUALITIES

USUAL = ("flux-dev", "sd3-medium", "sd35-large", "qwen-image:0.3", "wan-14b:0.1")
"""FLUX first; depth cut where a dense run is long."""
NEVER = 1e9
"""A difference that no step has."""

Run = Callable[[], Any]


def contestants(sampler: Sampler) -> Iterator[tuple[str, Run]]:
    """Each method's name and one run by it, compiled at its first."""
    torch._dynamo.reset()
    dense = torch.compile(sampler.model, fullgraph=True)
    yield "dense", lambda: sampler.run(dense)
    compiled = torch.compile(sampler.model, backend="specdiff", fullgraph=True)
    for quality in QUALITIES:
        yield (
            f"specdiff, {quality}",
            lambda quality=quality: with_preset(sampler, compiled, quality),
        )
    if importlib.util.find_spec("cache_dit") is not None:
        yield "cache-dit, every third step", cached(sampler)


def with_preset(sampler: Sampler, compiled: Any, quality: str) -> None:
    """One run at a preset, its times given."""
    with specdiff.session(compiled, timesteps=sampler.timesteps(), quality=quality):
        sampler.run(compiled)


def cached(sampler: Sampler) -> Run:
    """One run with cache-dit, which is switched on for it alone."""
    import cache_dit

    def run() -> None:
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=4,
            max_continuous_cached_steps=2,
            residual_diff_threshold=NEVER,
        )
        cache_dit.enable_cache(sampler.model, cache_config=config)
        try:
            sampler.run(sampler.model)
        finally:
            cache_dit.disable_cache(sampler.model)

    return run


def measured(sampler: Sampler, rounds: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Seconds, speedup and peak bytes of each method; a reason where one fails."""
    rows: dict[str, dict[str, Any]] = {}
    runs: list[tuple[str, Run]] = []
    for name, run in contestants(sampler):
        reset_peak(device)
        begun = time.perf_counter()
        try:
            run()
        except Exception as error:  # others' work may not fit: the table says so
            rows[name] = {"error": f"{type(error).__name__}: {error}"[:200]}
            continue
        rows[name] = {"first_seconds": time.perf_counter() - begun, "seconds": []}
        reset_peak(device)
        run()
        rows[name]["peak_bytes"] = peak(device)
        runs.append((name, run))
    turns = in_turns(runs, range(rounds), lambda each, _: each[1](), device)
    for (name, _), _, _, seconds in turns:
        rows[name]["seconds"].append(seconds)
    dense = statistics.median(rows["dense"]["seconds"])
    for name, _ in runs:
        rows[name]["speedup"] = dense / statistics.median(rows[name]["seconds"])
    return rows


def table(figures: dict[str, Any]) -> Table:
    """One row for each method and geometry."""
    shown = Table("geometry", "method", "seconds", "speedup", "peak GiB", "first run, s")
    for geometry, methods in figures["geometries"].items():
        if isinstance(methods, str):
            shown.add_row(geometry, methods)
            continue
        for name, row in methods.items():
            if "error" in row:
                shown.add_row(geometry, name, row["error"])
                continue
            memory = row["peak_bytes"]
            shown.add_row(
                geometry,
                name,
                f"{statistics.median(row['seconds']):.3f}",
                f"{row['speedup']:.2f}x",
                "" if memory is None else f"{memory / 2**30:.1f}",
                f"{row['first_seconds']:.0f}",
            )
    return shown


def main(
    names: Annotated[list[str] | None, typer.Argument(help="As NAME or NAME:SHARE.")] = None,
    device: str = "cuda",
    dtype: str | None = None,
    steps: int = 28,
    rounds: int = 3,
    seconds: Annotated[float, typer.Option(help="Begin no geometry after so long.")] = 1e9,
    out: Path = Path("presets.json"),
) -> None:
    """Measure the presets on these geometries."""
    place, begun = usable_device(device), time.monotonic()
    figures: dict[str, Any] = {"machine": environment(place), "steps": steps, "geometries": {}}
    for each in names or USUAL:
        if time.monotonic() - begun > seconds:
            figures["geometries"][each] = "not run: no time left"
            continue
        name, _, share = each.partition(":")
        sampler = build(name, place, type_of(dtype, place), steps, float(share or 1))
        figures["geometries"][each] = measured(sampler, rounds, place)
        del sampler
        gc.collect()
        out.write_text(json.dumps(figures, indent=1) + "\n")
    out.write_text(json.dumps(figures, indent=1) + "\n")
    Console().print(table(figures))


if __name__ == "__main__":
    typer.run(main)
