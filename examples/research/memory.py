"""Caches in 8 bits: bytes, fidelity and time of `kv_cache_dtype` on the trained models.

    python examples/research/memory.py --json examples/research/memory.json

Every picture is drawn dense, then with each setting in turn. Bytes of FLUX.1-dev are predicted, on
the meta device: nothing is allocated.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import specdiff
from specdiff.bench.geometries import build
from specdiff.measure.comparison import psnr
from specdiff.models.subject import MODELS, Request, Subject, find_subject, quiet_libraries
from specdiff.options import KV_CACHE_DTYPES
from specdiff.plan import Plan

DTYPES = (None, *KV_CACHE_DTYPES)
METHODS = {"history": Plan.tapered(4), "paper": Plan.warmup(3)}
"""Each with its plan."""
CPU = torch.device("cpu")
Figures = dict[str, Any]


class Setting:
    """One compiled pipeline, and what its pictures cost and gave."""

    def __init__(self, subject: Subject, method: str, dtype: str | None, ratio: float) -> None:
        self.names = {"model": subject.name, "method": method, "kv_cache_dtype": dtype}
        options = {"method": method, "plan": METHODS[method], "cache_ratio": ratio}
        options |= subject.options
        options |= {} if dtype is None else {"kv_cache_dtype": dtype}
        self._subject = subject
        self._pipeline = subject.load()
        self._pipeline.transformer = torch.compile(
            self._pipeline.transformer, backend="specdiff", fullgraph=True, options=options
        )
        self.pictures: list[Tensor] = []
        self.seconds: list[float] = []

    def draw(self, request: Request) -> None:
        """One picture [H, W, 3] and its processor time; the first of all also compiles."""
        start = time.process_time()
        latents = self._subject.draw(self._pipeline, request)
        self.seconds.append(time.process_time() - start)
        self.pictures.append(self._subject.picture(latents))

    def figures(self, dense: list[Tensor], plain: Setting) -> Figures:
        """Fidelity to the dense pictures and to those with caches in the model's dtype."""
        found = specdiff.stats(self._pipeline.transformer)
        assert not found.fallbacks, found.fallbacks
        each = [psnr(a, b) for a, b in zip(self.pictures, dense, strict=True)]
        apart = [psnr(a, b) for a, b in zip(self.pictures, plain.pictures, strict=True)]
        times = [a / b for a, b in zip(self.seconds, plain.seconds, strict=True)]
        return {
            **self.names,
            "cache_bytes": found.cache_bytes,
            "psnr_db": round(statistics.mean(each), 2),
            "psnr_db_each": [round(value, 2) for value in each],
            "psnr_db_to_plain": None if self is plain else round(statistics.mean(apart), 2),
            "cpu_time_ratio": round(statistics.median(times[1:]), 3),
            "selective_steps_share": round(found.selective / found.evaluations, 3),
        }


def measure(subject: Subject, method: str, pictures: int, seed: int, ratio: float) -> list[Figures]:
    """All dtypes of one model and method, in turn; the first picture is drawn once more."""
    requests = subject.requests(pictures, seed)
    pipeline = subject.load()
    dense = [subject.picture(subject.draw(pipeline, request)) for request in requests]
    settings = [Setting(subject, method, dtype, ratio) for dtype in DTYPES]
    for request in [requests[0], *requests]:
        for setting in settings:
            setting.draw(request)
    for setting in settings:
        del setting.pictures[0]  # of the run that compiled
    return [setting.figures(dense, settings[0]) for setting in settings]


def predicted(name: str, dtype: str | None) -> Figures:
    """What `specdiff.explain` says of a model in bfloat16 that is never allocated."""
    sampler = build(name, torch.device("meta"), torch.bfloat16)
    options = {} if dtype is None else {"kv_cache_dtype": dtype}
    found = specdiff.explain(sampler.model, **sampler.first_call(), options=options)
    return {
        "model": name,
        "kv_cache_dtype": dtype,
        "cache_bytes": found.cache_bytes,
        "formula": str(found.cache_formula),
    }


def show(rows: list[Figures], columns: dict[str, str]) -> None:
    """A table of these figures."""
    table = Table(*columns.values())
    for row in rows:
        table.add_row(*(str(row[name]) for name in columns))
    Console().print(table)


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the figures go.")] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Of each model and method.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the first picture.")] = 0,
    cache_ratio: Annotated[float, typer.Option(help="As of the backend.")] = 0.75,
    weights: Annotated[Path, typer.Option(help="Of the texture model.")] = Path(
        "examples/training/textures/textures.safetensors"
    ),
) -> None:
    """Measure, predict and print the tables."""
    quiet_libraries()
    measured: list[Figures] = []
    for model in MODELS:
        subject = find_subject(model, weights, CPU)
        for method in METHODS:
            torch._dynamo.reset()
            measured += measure(subject, method, pictures, seed, cache_ratio)
    geometries = [predicted("flux-dev", dtype) for dtype in DTYPES]
    names = ("model", "method", "kv_cache_dtype", "cache_bytes", "psnr_db", "psnr_db_to_plain")
    show(measured, {name: name for name in (*names, "cpu_time_ratio")})
    show(geometries, {name: name for name in geometries[0]})
    if json_file is not None:
        figures = {
            "torch": torch.__version__,
            "pictures": pictures,
            "cache_ratio": cache_ratio,
            "measured": measured,
            "predicted": geometries,
        }
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
