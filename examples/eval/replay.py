"""Whole-step plans replayed outside the runtime, to try placements, forecasts and corrections.

    python examples/eval/replay.py --plan 0,3,7,11,16,21,25,27 --forecast linear --correct parabola
    python examples/eval/replay.py --model textures --pictures 2 --plan ... --plan ...

The sampler is written out and the model runs eagerly: a plan costs its dense evaluations. Draws
what `specdiff tune` may draw, and prints the PSNR of each picture to the dense one.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdiff.comparison import psnr
from specdiff.evaluation.subject import Subject, find_subject

WEIGHTS = Path("examples/textures/textures.safetensors")
REACH = 0.5
"""How far a line is followed, as a share of its span; as in `specdiff.runtime.forecast`."""
Point = tuple[float, Tensor]
"""A time and what the model said then."""


def line(at: float, points: Sequence[Point], reach: float = REACH) -> Tensor:
    """Through the newest two points, followed no further than a share of their distance."""
    (time, newest), *older = points
    if not older:
        return newest
    span = time - older[0][0]
    ahead = max(-reach * abs(span), min(reach * abs(span), at - time))
    return newest + (newest - older[0][1]) * (ahead / span)


def parabola(at: float, points: Sequence[Point]) -> Tensor:
    """Through the newest three points (Newton's form), or the line through two."""
    if len(points) < 3:
        return line(at, points, float("inf"))
    (first, a), (second, b), (third, c) = points[:3]
    rise, earlier = (a - b) / (first - second), (b - c) / (second - third)
    return (
        a + rise * (at - first) + (rise - earlier) / (first - third) * (at - first) * (at - second)
    )


FORECASTS: dict[str, Callable[[float, Sequence[Point]], Tensor]] = {
    "reuse": lambda at, points: points[0][1],
    "linear": line,
    "quadratic": parabola,
}
CORRECTIONS: dict[str, Callable[[float, Sequence[Point]], Tensor] | None] = {
    "none": None,
    "line": lambda at, points: line(at, points[:2], float("inf")),
    "parabola": parabola,
}


def replay(
    predict: Callable[[Tensor, int], Tensor],
    latent: Tensor,
    sigmas: Sequence[float],
    dense: Sequence[int],
    forecast: str,
    correct: str,
) -> Tensor:
    """The final latent of a flow under Euler, of which only the evaluations `dense` compute."""
    points: list[Point] = []
    skipped: list[tuple[float, float, Tensor]] = []
    for index, (time, after) in enumerate(itertools.pairwise(sigmas)):
        step = after - time
        if index not in dense:
            guess = FORECASTS[forecast](time, points)
            skipped.append((time, step, guess))
            latent = latent + step * guess
            continue
        points = [(time, predict(latent, index)), *points][:3]
        if (known := CORRECTIONS[correct]) is not None:
            for at, width, guess in skipped:
                latent = latent + width * (known(at, points) - guess)
        skipped = []
        latent = latent + step * points[0][1]
    return latent


def record(subject: Subject, pipeline: Any, number: int) -> tuple[Tensor, list[dict[str, Any]]]:
    """The model's arguments at each step of a dense run, and the final latents."""
    calls: list[dict[str, Any]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append(kwargs)

    hook = pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
    latents = subject.draw(pipeline, subject.tuning_requests(number + 1)[number])
    hook.remove()
    return latents, calls


def predictor(
    model: Any, calls: Sequence[dict[str, Any]], scale: float | None
) -> Callable[[Tensor, int], Tensor]:
    """The (guided) velocity of a latent at a step, as the pipeline would ask for it."""

    def predict(latent: Tensor, index: int) -> Tensor:
        halves = 1 if scale is None else 2
        asked = {**calls[index], "hidden_states": torch.cat([latent] * halves)}
        found: Tensor = model(**asked)[0]
        if scale is None:
            return found
        without, given = found.chunk(2)
        return torch.lerp(without, given, scale)

    return predict


@torch.no_grad()
def main() -> None:
    """Replay every plan on every picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--first", type=int, default=0, help="number of the first picture")
    parser.add_argument("--plan", action="append", required=True, help="dense evaluations: 0,3,7")
    parser.add_argument("--forecast", choices=FORECASTS, default="linear")
    parser.add_argument("--correct", choices=CORRECTIONS, default="parabola")
    wanted = parser.parse_args()
    subject = find_subject(wanted.model, wanted.weights, torch.device("cpu"))
    pipeline = subject.load()
    scale = subject.options.get("guidance_scale")
    for number in range(wanted.first, wanted.first + wanted.pictures):
        latents, calls = record(subject, pipeline, number)
        reference, sigmas = subject.picture(latents), pipeline.scheduler.sigmas.tolist()
        start = calls[0]["hidden_states"][: len(latents)]
        predict = predictor(pipeline.transformer, calls, scale)
        for plan in wanted.plan:
            dense = [int(index) for index in plan.split(",")]
            found = replay(predict, start, sigmas, dense, wanted.forecast, wanted.correct)
            print(f"{number} {plan} {psnr(subject.picture(found), reference):.2f} dB", flush=True)


if __name__ == "__main__":
    main()
