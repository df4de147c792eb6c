"""How close to the solution of the sampling equation do so many evaluations come?

The solution is 150 steps of Adams-Bashforth's second order. Rivals take fewer steps of their own,
by better solvers; specdiff runs under Euler's 28. PSNR in dB, mean and mean of the worst tenth.

    python examples/research/solution.py --pictures 16

Goes on where it stopped: solution.json holds what is known, of each picture apart.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)
from solution_report import (
    COUNT,
    FEWER,
    QUALITY,
    STEPS,
    Known,
    draw_plot,
    key_of,
    report,
)
from torch import Tensor

import specdiff
from specdiff.measure.comparison import psnr
from specdiff.models import demo, textures
from specdiff.models.subject import CROPS, TUNED_ON
from specdiff.plan import Plan
from specdiff.settings import SOLUTION_PLANS

HERE = Path(__file__).parent
SEED, REFERENCE = 100, 150
OURS = {
    6: Plan.of(STEPS, (0, 5, 11, 17, 23, 27)),
    8: Plan.of(STEPS, (0, 3, 7, 11, 16, 21, 25, 27)),
    **{len(plan.dense): plan for plan in SOLUTION_PLANS.values()},
    28: Plan.every(1),
}
"""Plans by their evaluations: those of the qualities, and fewer and more."""
LEAST = 1e-4
"""Sigma in place of 0, and of 1 by as much less, where a formula has none there."""
Field = Callable[[Any, Tensor, float], Tensor]
"""(model, latent, sigma) -> guided velocity"""


def emoji(index: int) -> tuple[Tensor, Field]:
    """Start and velocity of a picture that nothing was tuned on, or one to tune on, below 0."""
    names = demo.stored_prompts()[:TUNED_ON] if index < 0 else demo.stored_prompts()[TUNED_ON:]
    tokens, pooled = demo.prompt_embeddings([names[index % len(names)]])
    side = torch.arange(32)
    places = torch.stack([torch.zeros(32, 32), *torch.meshgrid(side, side, indexing="ij")], -1)
    given = {
        "encoder_hidden_states": tokens,
        "pooled_projections": pooled,
        "img_ids": places.reshape(-1, 3),
        "txt_ids": torch.zeros(tokens.shape[1], 3),
        "return_dict": False,
    }

    def velocity(model: Any, x: Tensor, sigma: float) -> Tensor:
        found: Tensor = model(hidden_states=x, timestep=torch.full((1,), sigma), **given)[0]
        return found

    return torch.randn(1, 1024, 48, generator=torch.Generator().manual_seed(SEED + index)), velocity


def crop(index: int, name: str) -> tuple[Tensor, Field]:
    """The same, of a guided picture of crops: both halves in one batch."""
    classes, class_codes, scale = CROPS[name]
    states = class_codes([classes[index % len(classes)]])
    tokens, pooled = (torch.cat([torch.zeros_like(code), code]) for code in states)
    given = {"encoder_hidden_states": tokens, "pooled_projections": pooled, "return_dict": False}

    def velocity(model: Any, x: Tensor, sigma: float) -> Tensor:
        time = torch.full((2,), sigma * 1000)
        both: Tensor = model(hidden_states=torch.cat([x, x]), timestep=time, **given)[0]
        return torch.lerp(*both.chunk(2), scale)

    start = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(SEED + index))
    return start, velocity


def _model_of_crops(name: str) -> Model:
    weights = HERE.parent / "training" / name / f"{name}.safetensors"
    return (
        partial(textures.load_transformer, weights),
        partial(crop, name=name),
        textures.to_pixels,
        {"guidance_scale": CROPS[name][2]},
    )


Model = tuple[Callable[[], Any], Callable[[int], tuple[Tensor, Field]], Any, dict[str, Any]]
"""load(), picture of a number, to_pixels, options"""
MODELS: dict[str, Model] = {
    "emoji": (demo.load_transformer, emoji, demo.to_pixels, {}),
    **{name: _model_of_crops(name) for name in CROPS},
}


def grid(steps: int) -> list[float]:
    """Sigmas from 1 to 0, shifted by three."""
    evenly = [1 - i / steps for i in range(steps + 1)]
    return [3 * s / (1 + 2 * s) for s in evenly]


Velocity = Callable[[Tensor, float], Tensor]


def euler(x: Tensor, velocity: Velocity, evaluations: int) -> Tensor:
    """As many steps."""
    for here, there in itertools.pairwise(grid(evaluations)):
        x = x + (there - here) * velocity(x, here)
    return x


def adams_bashforth(x: Tensor, velocity: Velocity, evaluations: int) -> Tensor:
    """Order two."""
    before, last = None, 0.0
    for here, there in itertools.pairwise(grid(evaluations)):
        now = velocity(x, here)
        slope = 0 if before is None else (now - before) / (here - last)
        x = x + (there - here) * (now + slope * (there - here) / 2)
        before, last = now, here
    return x


def heun(x: Tensor, velocity: Velocity, evaluations: int) -> Tensor:
    """Two evaluations a step, one in the last (Karras et al. 2022); of an even number one less."""
    for here, there in itertools.pairwise(grid((evaluations + 1) // 2)):
        now = velocity(x, here)
        then = velocity(x + (there - here) * now, there) if there else now
        x = x + (there - here) / 2 * (now + then)
    return x


def of_diffusers(kind: Any, order: int) -> Callable[[Tensor, Velocity, int], Tensor]:
    """A scheduler's steps, at exact sigmas."""

    def solve(x: Tensor, velocity: Velocity, evaluations: int) -> Tensor:
        scheduler = kind(
            solver_order=order,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=3.0,
        )
        scheduler.set_timesteps(evaluations)
        sigmas = grid(evaluations)
        least = LEAST if kind is DEISMultistepScheduler else 0.0  # which takes its logarithm
        scheduler.sigmas = torch.tensor([1 - LEAST, *sigmas[1:-1], least])
        for at, sigma in zip(scheduler.timesteps, sigmas, strict=False):
            x = scheduler.step(velocity(x, sigma), at, x, return_dict=False)[0]
        return x

    return solve


SOLVERS = {
    "Euler": euler,
    "Adams-Bashforth 2": adams_bashforth,
    "Heun": heun,
    "DPM-Solver++ 2M": of_diffusers(DPMSolverMultistepScheduler, 2),
    "DPM-Solver++ 3M": of_diffusers(DPMSolverMultistepScheduler, 3),
    "UniPC": of_diffusers(UniPCMultistepScheduler, 2),
    "DEIS": of_diffusers(DEISMultistepScheduler, 2),
}


def tiers() -> list[list[tuple[str, int]]]:
    """Names and evaluations of all that is measured; first what matters most."""
    ours = "specdiff, solution"
    some = ("Adams-Bashforth 2", "DPM-Solver++ 2M", "UniPC")
    goals = [("Euler", STEPS), (ours, 10), (ours, 15)]
    rivals = [(solver, count) for count in (10, 15) for solver in some]
    others = [[(method, count) for method in (ours, *some)] for count in (8, 6, 12, 20, STEPS)]
    rest = [(solver, count) for solver in SOLVERS for count in FEWER]
    return [goals, rivals, [(ours, STEPS)], *others, rest]


class Drawer:
    """Draws the pictures of one model."""

    def __init__(self, name: str, *, eager: bool) -> None:
        self.name = name
        load, self.picture, self.to_pixels, options = MODELS[name]
        inner = "eager" if eager else "inductor"
        self.model: Any = load() if eager else torch.compile(load())
        self.compiled: Any = torch.compile(
            load(), backend="specdiff", options={"inner_backend": inner, **options}
        )

    def draw(self, index: int, method: str, evaluations: int | Plan) -> Tensor:
        """The picture [3, H, W], in 0..1: by a solver and its evaluations, or by specdiff."""
        x, field = self.picture(index)
        if method in SOLVERS:
            found = SOLVERS[method](x, lambda x, s: field(self.model, x, s), evaluations)
            return self.to_pixels(found)[0]
        target = method.rpartition(" ")[2]
        plan = OURS[evaluations] if isinstance(evaluations, int) else evaluations
        return self._ours(x, field, target=target, plan=plan)

    def by_quality(self, index: int, quality: str) -> tuple[Tensor, int]:
        """The picture by a quality that aims at the solution, and the evaluations it computed."""
        x, field = self.picture(index)
        with specdiff.record(self.compiled) as recording:
            found = self._ours(x, field, target="solution", quality=quality)
        return found, sum(step.kind == "dense" for step in recording.steps)

    def _ours(self, x: Tensor, field: Field, **settings: Any) -> Tensor:
        with specdiff.session(self.compiled, grid(STEPS)[:-1], **settings):
            found = euler(x, lambda x, s: field(self.compiled, x, s), STEPS)
        return self.to_pixels(found)[0]

    def exact(self, index: int, references: Path) -> Tensor:
        """The solution's picture, which is kept in a folder."""
        kept = references / f"{self.name}-{index}.pt"
        if not kept.exists():
            references.mkdir(parents=True, exist_ok=True)
            torch.save(self.draw(index, "Adams-Bashforth 2", REFERENCE), kept)
        found: Tensor = torch.load(kept)
        return found


def measure(
    known: Known, drawers: dict[str, Drawer], pictures: int, references: Path
) -> Iterator[None]:
    """Fill in what is missing; yields after each picture."""
    for tier, index, model in itertools.product(tiers(), range(pictures), drawers):
        found, drawer = known.setdefault(model, {}), drawers[model]
        missing = [row for row in tier if str(index) not in found.get(key_of(*row), {})]
        if not missing:
            continue
        exact = drawer.exact(index, references)
        for row in missing:
            value = psnr(drawer.draw(index, *row), exact)
            found.setdefault(key_of(*row), {})[str(index)] = round(value, 3)
        print(model, index, flush=True)
        yield


def measure_qualities(
    known: Known, drawers: dict[str, Drawer], pictures: int, references: Path
) -> Iterator[None]:
    """The same of the qualities, which compute more where forecasts miss much."""
    for index, model, quality in itertools.product(range(pictures), drawers, SOLUTION_PLANS):
        found = known.setdefault(model, {}).setdefault(key_of(QUALITY, quality), {})
        counts = known[model].setdefault(key_of(COUNT, quality), {})
        if str(index) not in found:
            exact = drawers[model].exact(index, references)
            picture, counts[str(index)] = drawers[model].by_quality(index, quality)
            found[str(index)] = round(psnr(picture, exact), 3)
            print(model, index, quality, flush=True)
            yield


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--model", choices=[*MODELS], nargs="*", default=["emoji", "textures"])
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--references", type=Path, default=Path("solution-references"))
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after")
    parser.add_argument("--qualities", action="store_true", help="measure these alone")
    parser.add_argument("--name", default="solution")
    parser.add_argument("--eager", action="store_true", help="compile nothing: for a few pictures")
    wanted = parser.parse_args()
    until = time.monotonic() + 60 * wanted.minutes
    torch.set_grad_enabled(False)
    file = wanted.out / f"{wanted.name}.json"
    known: Known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    drawers = {model: Drawer(model, eager=wanted.eager) for model in wanted.model}
    fill = measure_qualities if wanted.qualities else measure
    for _ in fill(known, drawers, wanted.pictures, wanted.references):
        file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        if time.monotonic() > until:
            break
    file.with_suffix(".md").write_text(report(known), encoding="utf-8")
    draw_plot(known, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
