"""Does it matter how a pipeline guides, and whether anybody told the scale?

Pictures of a model with classifier-free guidance, drawn with both halves in one batch, and with a
call for each; with `guidance_scale` given, and without. PSNR to the dense picture.

    python examples/research/guidance.py --pictures 8

Goes on where it stopped: guidance.json holds what is known, of each picture apart.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from solution import MODELS, Field, euler, grid
from solution_report import STEPS, made_by
from torch import Tensor

import specdiff
from specdiff.measure.comparison import psnr
from specdiff.models.subject import CROPS

HERE = Path(__file__).parent
SIGMAS = grid(STEPS)
QUALITY_NAMES = ("near-lossless", "balanced")
HOW = ("one batch, scale told", "one batch", "a call each")
WHEN = ("times given", "times read")


def call_each(model: Any, x: Tensor, sigma: float, codes: Any, scale: float) -> Tensor:
    """Guided velocity by a call for each half; `codes` are (tokens, pooled) of each, by half."""
    found = [
        model(
            hidden_states=x,
            timestep=torch.full((len(x),), sigma * 1000),
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        for tokens, pooled in codes
    ]
    conditional, unconditional = found
    return torch.lerp(unconditional, conditional, scale)


def measure(name: str, models: dict[bool, Any], index: int) -> dict[str, tuple[float, float]]:
    """By quality, way of guidance and of times: evaluations of each half, and PSNR."""
    classes, class_codes, scale = CROPS[name]
    states = class_codes([classes[index % len(classes)]])
    codes = (states, tuple(torch.zeros_like(code) for code in states))
    _, picture, to_pixels, _ = MODELS[name]
    start, batch = picture(index)
    fields: dict[str, Field] = dict.fromkeys(HOW[:2], batch)
    fields[HOW[2]] = partial(call_each, codes=codes, scale=scale)
    with specdiff.session(models[False], quality="dense"):
        dense = to_pixels(euler(start, partial(batch, models[False]), STEPS))[0]
    found = {}
    for quality, how, when in itertools.product(QUALITY_NAMES, HOW, WHEN):
        model = models[how == HOW[0]]
        specdiff.reset(model)
        times = SIGMAS[:-1] if when == WHEN[0] else None
        with specdiff.session(model, times, quality=quality):
            drawn = to_pixels(euler(start, partial(fields[how], model), STEPS))[0]
        count = specdiff.stats(model).dense / (2 if how == HOW[2] else 1)
        key = " | ".join((quality, how, when))
        found[key] = (count, round(psnr(drawn, dense), 2))
    return found


def report(known: dict[str, dict[str, dict[str, tuple[float, float]]]]) -> str:
    """The page of the tables."""
    parts = [
        "# Ways to guide",
        made_by("guidance.py"),
        "PSNR to the dense picture, dB. Nothing was tuned on these pictures. With its scale told, a"
        " batch's losses are made good, too; so are those of a call each, where times are read.",
    ]
    for model, pictures in known.items():
        rows = ["| quality | guidance | times | evaluations | mean | lowest |", "|" + "---|" * 6]
        for key in next(iter(pictures.values())):
            counts, values = zip(*(each[key] for each in pictures.values()), strict=True)
            numbers = statistics.fmean(counts), statistics.fmean(values), min(values)
            rows.append(f"| {key} | " + " | ".join(f"{x:.1f}" for x in numbers) + " |")
        scale = CROPS[model][2]
        parts += [f"## {model}, scale {scale:g}, {len(pictures)} pictures", "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--model", choices=[*CROPS], nargs="*", default=[*CROPS])
    parser.add_argument("--out", type=Path, default=HERE)
    wanted = parser.parse_args()
    torch.set_grad_enabled(False)
    file = wanted.out / "guidance.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in wanted.model:
        load, _, _, options = MODELS[name]
        models = {told: load() for told in (False, True)}
        for told, model in models.items():
            specdiff.attach(model, **(options if told else {}))
        for index in range(wanted.pictures):
            if str(index) not in known.setdefault(name, {}):
                known[name][str(index)] = measure(name, models, index)
                file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
                print(name, index, known[name][str(index)], flush=True)
    file.with_suffix(".md").write_text(report(known), encoding="utf-8")


if __name__ == "__main__":
    main()
