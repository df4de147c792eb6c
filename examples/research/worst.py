"""What decides the worst picture, and does a plan that grows where a picture is hard lift it?

Dense evaluations are placed by fixed plans, and by plans that add evaluations where an estimate of
the forecast's error is large. The estimates are read without delay, which favours them. Steps in
between are forecast and made good as by method "history": along the line through two predictions,
then by the parabola through three (a row drawn by specdiff itself shows that it is the same).

    python examples/research/worst.py --pictures 8

Goes on where it stopped: worst.json holds what is known, of each picture apart.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from solution import MODELS, Field, euler, grid
from solution_report import STEPS, made_by
from torch import Tensor

import specdiff
from specdiff.measure.comparison import psnr, worst_tenth
from specdiff.runtime.tokens.forecast import ahead
from specdiff.runtime.tokens.history import ComputedOutput
from specdiff.runtime.tokens.shortfall import between
from specdiff.settings import QUALITIES

HERE = Path(__file__).parent
SIGMAS = grid(STEPS)
BY_SPECDIFF = "near-lossless, by specdiff"
ALONE = (2, 6, 13, 24)
"""Evaluations of which each is left out alone, to see what becomes of its error."""


class Run:
    """One picture in the making."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.evaluations = x, 0
        self.computed: list[ComputedOutput] = []
        self.missed = 0.0
        """What the last forecast before a computed prediction missed of it, relative."""
        self.moved = 0.0
        """How far the latent went between the last two computed predictions, relative."""
        self._waiting: list[tuple[int, Tensor]] = []
        self._before = x

    def compute(self, index: int, prediction: Tensor) -> None:
        """Step by a computed prediction, and by what earlier forecasts have cost."""
        if self.computed:
            self.missed = _share(self._line(index) - prediction, prediction)
            self.moved = _share(self.x - self._before, self.x)
        newest = ComputedOutput(SIGMAS[index], prediction)
        self.computed, self._before = [newest, *self.computed][:3], self.x
        self.evaluations += 1
        for at, handed in self._waiting:
            self.x = self.x + _length(at) * (between(self.computed, SIGMAS[at]) - handed)
        self._waiting = []
        self.x = self.x + _length(index) * prediction

    def forecast(self, index: int) -> None:
        """Step by a forecast."""
        handed = self._line(index)
        self._waiting.append((index, handed))
        self.x = self.x + _length(index) * handed

    def _line(self, index: int) -> Tensor:
        newest, *older = self.computed
        if not older:
            return newest.tokens
        share = ahead(SIGMAS[index], newest.times, older[0].times)
        return newest.tokens + share * (newest.tokens - older[0].tokens)


def _length(index: int) -> float:
    return SIGMAS[index + 1] - SIGMAS[index]


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part.norm() / whole.norm())


class Way(NamedTuple):
    """Which evaluations are computed: those of a plan, and those before which `score` is large."""

    places: frozenset[int]
    score: Callable[[Run], float] = lambda run: 0.0
    most: float = math.inf


SECOND = frozenset({*range(0, 27, 2), 27})
"""Every second evaluation and the last: fifteen."""
SCORES: dict[str, tuple[Callable[[Run], float], tuple[float, ...]]] = {
    "the last miss": (lambda run: run.missed, (0.05, 0.1)),
    "the latent's way": (lambda run: run.moved, (0.05, 0.1)),
}
"""Estimates by which a plan grows, and from which values on."""
WAYS: dict[str, Way] = {
    **{name: Way(frozenset(plan.dense)) for name, plan in QUALITIES.items()},
    "every second": Way(SECOND),
    "every second, the first five too": Way(SECOND | set(range(5))),
    "every second, the last seven too": Way(SECOND | set(range(21, 28))),
    **{
        f"every second, and where {name} is above {most:g}": Way(SECOND, score, most)
        for name, (score, values) in SCORES.items()
        for most in values
    },
}


def draw(start: Tensor, velocity: Callable[[Tensor, float], Tensor], way: Way) -> Run:
    """Draw one picture."""
    run = Run(start)
    for index in range(STEPS):
        if index in way.places or not run.computed or way.score(run) > way.most:
            run.compute(index, velocity(run.x, SIGMAS[index]))
        else:
            run.forecast(index)
    return run


def remembered(velocity: Callable[[Tensor, float], Tensor]) -> Callable[[Tensor, float], Tensor]:
    """The same, evaluated once where several ways come by the same latent."""
    known: dict[tuple[float, bytes], Tensor] = {}

    def recall(x: Tensor, sigma: float) -> Tensor:
        key = (sigma, x.numpy().tobytes())
        if key not in known:
            known[key] = velocity(x, sigma)
        return known[key]

    return recall


class Measured(NamedTuple):
    """Of one picture."""

    evaluations: int
    psnr: float


def measure_picture(
    model: Any, compiled: Any, start: Tensor, field: Field, to_pixels: Any
) -> dict[str, Any]:
    """By way, [evaluations, PSNR]; by evaluation left out, what its error is multiplied by."""
    velocity = remembered(partial(field, model))
    every = draw(start, velocity, Way(frozenset(range(STEPS))))
    dense = to_pixels(every.x)[0]
    found: dict[str, Any] = {}
    for name, way in WAYS.items():
        run = draw(start, velocity, way)
        found[name] = Measured(run.evaluations, round(psnr(to_pixels(run.x)[0], dense), 2))
    with specdiff.session(compiled, SIGMAS[:-1], quality="near-lossless"):
        own = euler(start, partial(field, compiled), STEPS)
    count = len(QUALITIES["near-lossless"].dense)
    found[BY_SPECDIFF] = Measured(count, round(psnr(to_pixels(own)[0], dense), 2))
    for alone in ALONE:
        run = draw(start, velocity, Way(frozenset(range(STEPS)) - {alone}))
        found[f"without {alone}"] = round(psnr(to_pixels(run.x)[0], dense), 2)
    return found


def report(known: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The page of the tables."""
    parts = [
        "# The worst picture",
        made_by("worst.py"),
        "PSNR to the dense picture, dB. Nothing was tuned on these pictures. `worst.py` says what"
        " the rows are; what follows from them is in [docs/results.md](../../docs/results.md).",
    ]
    for model, pictures in known.items():
        rows = ["| computed | evaluations | mean | worst tenth | lowest |", "|---|---|---|---|---|"]
        for name in [*WAYS, BY_SPECDIFF]:
            measured = [Measured(*each[name]) for each in pictures.values()]
            values = [each.psnr for each in measured]
            count = statistics.fmean(each.evaluations for each in measured)
            means = statistics.fmean(values), worst_tenth(values), min(values)
            rows.append(f"| {name} | {count:.1f} | " + " | ".join(f"{x:.1f}" for x in means) + " |")
        alone = [[each[f"without {index}"] for each in pictures.values()] for index in ALONE]
        said = "; ".join(
            f"{index}: {statistics.fmean(values):.1f}, {min(values):.1f} to {max(values):.1f}"
            for index, values in zip(ALONE, alone, strict=True)
        )
        parts += [f"## {model}, {len(pictures)} pictures", "\n".join(rows)]
        parts += [f"One evaluation alone left out, mean and range, dB: {said}."]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--model", choices=[*MODELS], nargs="*", default=[*MODELS])
    parser.add_argument("--out", type=Path, default=HERE)
    wanted = parser.parse_args()
    torch.set_grad_enabled(False)
    file = wanted.out / "worst.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in wanted.model:
        load, picture, to_pixels, options = MODELS[name]
        model, compiled = load(), load()
        specdiff.attach(compiled, **options)
        for index in range(wanted.pictures):
            if str(index) in known.setdefault(name, {}):
                continue
            known[name][str(index)] = measure_picture(model, compiled, *picture(index), to_pixels)
            file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            print(name, index, flush=True)
    file.with_suffix(".md").write_text(report(known), encoding="utf-8")


if __name__ == "__main__":
    main()
