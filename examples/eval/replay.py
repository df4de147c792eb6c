"""Whole-step plans replayed outside the runtime, to try placements, forecasts and corrections.

    python examples/eval/replay.py --plan 0,3,7,11,16,21,25,27 --forecast linear --correct parabola
    python examples/eval/replay.py --model textures --forecast linear hermite --plan ... --plan ...

The sampler is written out and the model runs eagerly: a plan costs its dense evaluations. Draws
what `specdiff tune` may draw, and prints the PSNR of each picture to the dense one. The two-sided
forecasts cost one evaluation more than the plan says: compare them with a plan of one more.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdiff.comparison import psnr
from specdiff.evaluation.cli import WEIGHTS
from specdiff.evaluation.subject import Subject, find_subject

REACH = 0.5
"""How far a line is followed, as a share of its span; as in `specdiff.runtime.tokens.forecast`."""
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


def hermite(at: float, points: Sequence[Point], reach: float = REACH) -> Tensor:
    """The cubic through the newest two points, followed no further than `line`.

    Its slope at each is that of the parabola through the point and the two before it: four points
    in all, with fewer a line.
    """
    if len(points) < 4:
        return line(at, points, reach)
    (first, a), (second, b) = points[:2]
    span = first - second
    at = first + max(-reach * abs(span), min(reach * abs(span), at - first))
    share = (at - second) / span
    rise_a, rise_b = (_slope(points[k : k + 3]) * span for k in (0, 1))
    return (
        b
        + (a - b) * share**2 * (3 - 2 * share)
        + rise_b * share * (1 - share) ** 2
        - rise_a * share**2 * (1 - share)
    )


def _slope(points: Sequence[Point]) -> Tensor:
    """Of the parabola through three points, at the newest."""
    (first, a), (second, b), (third, c) = points
    rise, earlier = (a - b) / (first - second), (b - c) / (second - third)
    return rise + (rise - earlier) * (first - second) / (first - third)


@dataclass(frozen=True)
class Gap:
    """A step that is forecast.

    Attributes:
        at: When it starts.
        after: When it ends.
        points: What the dense evaluations said, newest first.
        future: What the speculative one says, of a time still to come; None if there is none.
        jumped: When the jump to it was made.
    """

    at: float
    after: float
    points: Sequence[Point]
    future: Point | None
    jumped: float

    @property
    def middle(self) -> float:
        """Where a line has its mean over the step: what Adams-Bashforth integrates."""
        return (self.at + self.after) / 2


def chord(gap: Gap) -> Tensor:
    """From the newest point towards the speculative one."""
    if gap.future is None:
        return line(gap.at, gap.points)
    return line(gap.at, [gap.points[0], gap.future], float("inf"))


def fading(gap: Gap) -> Tensor:
    """From the chord to the line, as the speculative time comes nearer."""
    if gap.future is None:
        return line(gap.at, gap.points)
    goal = gap.future[0]
    weight = (gap.at - goal) / (gap.jumped - goal)
    return torch.lerp(line(gap.at, gap.points), chord(gap), weight)


def arch(gap: Gap) -> Tensor:
    """The parabola through the newest two points and the speculative one."""
    if gap.future is None:
        return line(gap.at, gap.points)
    return parabola(gap.at, [gap.future, *gap.points[:2]])


FORECASTS: dict[str, Callable[[Gap], Tensor]] = {
    "reuse": lambda gap: gap.points[0][1],
    "linear": lambda gap: line(gap.at, gap.points),
    "quadratic": lambda gap: parabola(gap.at, gap.points),
    "adams-bashforth": lambda gap: line(gap.middle, gap.points),
    "adams-bashforth-unbound": lambda gap: line(gap.middle, gap.points, float("inf")),
    "hermite": lambda gap: hermite(gap.at, gap.points),
    "hermite-unbound": lambda gap: hermite(gap.at, gap.points, float("inf")),
}
TWO_SIDED: dict[str, Callable[[Gap], Tensor]] = {"chord": chord, "fading": fading, "arch": arch}
"""These look ahead: one more evaluation, after an Euler jump from the second dense one."""
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
    goal: float,
) -> Tensor:
    """The final latent of a flow under Euler, of which only the evaluations `dense` compute.

    A two-sided forecast also evaluates at the sigma nearest to `goal`.
    """
    guess_at = (FORECASTS | TWO_SIDED)[forecast]
    target = min(range(len(sigmas) - 1), key=lambda index: abs(sigmas[index] - goal))
    points: list[Point] = []
    future: Point | None = None
    skipped: list[tuple[float, float, Tensor]] = []
    for index, (time, after) in enumerate(itertools.pairwise(sigmas)):
        step = after - time
        if index not in dense:
            ahead = future if index < target else None
            guess = guess_at(Gap(time, after, points, ahead, sigmas[dense[1]]))
            skipped.append((time, step, guess))
            latent = latent + step * guess
            continue
        points = [(time, predict(latent, index)), *points][:4]
        if (known := CORRECTIONS[correct]) is not None:
            for at, width, guess in skipped:
                latent = latent + width * (known(at, points) - guess)
        skipped = []
        if forecast in TWO_SIDED and index == dense[1]:
            jump = latent + (sigmas[target] - time) * points[0][1]
            future = (sigmas[target], predict(jump, target))
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
    parser.add_argument("--forecast", choices=FORECASTS | TWO_SIDED, nargs="+", default=["linear"])
    parser.add_argument("--goal", type=float, default=0.6, help="sigma two-sided forecasts look at")
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
        for plan, forecast in itertools.product(wanted.plan, wanted.forecast):
            dense = [int(index) for index in plan.split(",")]
            found = replay(predict, start, sigmas, dense, forecast, wanted.correct, wanted.goal)
            decibels = psnr(subject.picture(found), reference)
            print(f"{number} {plan} {forecast} {decibels:.2f} dB", flush=True)


if __name__ == "__main__":
    main()
