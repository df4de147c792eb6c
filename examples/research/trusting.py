"""How much may a forecast miss? Each quality's plan, with more trust in its forecasts and less.

A quality computes its plan, and more where forecasts miss more than it trusts them to. PSNR to the
dense picture, and evaluations: those that trust adds belong to the pictures that need them.

    python examples/research/trusting.py --pictures 16

Goes on where it stopped: trusting.json holds what is known, of each picture apart.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from solution import MODELS, euler
from solution_report import STEPS, key_of, made_by
from torch import Tensor

import specdiff
from specdiff.measure.comparison import psnr, worst_tenth
from specdiff.settings import QUALITIES, TRUSTED

HERE = Path(__file__).parent
SHARES = (0.0, 0.1, 0.15, 0.2, 0.3, 0.5)
"""What forecasts may miss; 0: the plan alone."""
FIRST = 8
"""Of the pictures: those before it chose the values."""
Known = dict[str, dict[str, dict[str, tuple[int, float]]]]
"""model, then "quality, share", then picture: evaluations and PSNR"""


def rows() -> list[tuple[str, float]]:
    """Qualities and shares; first what each quality has, then the plans alone."""
    usual = [*TRUSTED.items()]
    every = [(quality, share) for share in SHARES for quality in QUALITIES]
    return [*usual, *(row for row in every if row not in usual)]


class Drawer:
    """Draws the pictures of one model."""

    def __init__(self, name: str) -> None:
        load, self.picture, self.to_pixels, options = MODELS[name]
        self.model: Any = load()
        specdiff.attach(self.model, **options)

    def draw(self, index: int, **options: Any) -> tuple[int, Tensor]:
        """Evaluations, and the picture [3, H, W]; times are read, as in a pipeline."""
        start, field = self.picture(index)
        specdiff.reset(self.model)
        with specdiff.session(self.model, **options):
            drawn = euler(start, partial(field, self.model), STEPS)
        return specdiff.stats(self.model).dense, self.to_pixels(drawn)[0]


def measure(known: Known, pictures: int, models: list[str], count: int) -> Iterator[None]:
    """Fill in the first so many rows; yields after each picture."""
    drawers = {name: Drawer(name) for name in models}
    for name, index in itertools.product(models, range(FIRST, FIRST + pictures)):
        found, drawer = known.setdefault(name, {}), drawers[name]
        missing = [row for row in rows()[:count] if str(index) not in found.get(key_of(*row), {})]
        if missing:
            _, dense = drawer.draw(index, quality="dense")
        for quality, share in missing:
            evaluations, drawn = drawer.draw(index, quality=quality, ablation={"trusted": share})
            value = min(psnr(drawn, dense), 99.0)
            found.setdefault(key_of(quality, share), {})[str(index)] = evaluations, round(value, 2)
        if missing:
            print(name, index, flush=True)
            yield


def report(known: Known) -> str:
    """The page of the tables."""
    parts = [
        "# How much a forecast may miss",
        made_by("trusting.py"),
        "Times are read. PSNR to the dense picture, dB, at most 99; nothing was chosen on these"
        " pictures. 0 trusts the plan alone; in bold what a quality does.",
    ]
    for model, found in known.items():
        lines = [
            "| quality | may miss | evaluations | mean | worst tenth | 95 % have | lowest | of |",
            "|" + "---|" * 8,
            *(
                _line(quality, share, [*found[key_of(quality, share)].values()])
                for quality, share in itertools.product(QUALITIES, SHARES)
                if key_of(quality, share) in found
            ),
        ]
        parts += [f"## {model}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _line(quality: str, share: float, measured: list[tuple[int, float]]) -> str:
    counts, values = zip(*measured, strict=True)
    most = sorted(values)[len(values) // 20]
    numbers = [statistics.fmean(values), worst_tenth(values), most, min(values)]
    cells = [f"{share:g}", f"{statistics.fmean(counts):.1f}", *(f"{x:.1f}" for x in numbers)]
    if share == TRUSTED[quality]:
        cells = [f"**{cell}**" for cell in cells]
    return " | ".join([f"| {quality}", *cells, f"{len(values)} |"])


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--model", choices=[*MODELS], nargs="*", default=[*MODELS])
    parser.add_argument("--rows", type=int, default=len(rows()), help="measure the first so many")
    parser.add_argument("--out", type=Path, default=HERE)
    wanted = parser.parse_args()
    torch.set_grad_enabled(False)
    file = wanted.out / "trusting.json"
    known: Known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for _ in measure(known, wanted.pictures, wanted.model, wanted.rows):
        file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(report(known), encoding="utf-8")


if __name__ == "__main__":
    main()
