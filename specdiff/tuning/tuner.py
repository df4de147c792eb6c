"""Tuning: the fastest plan that keeps pictures as close to the dense ones as is asked for.

    def draw(index: int) -> Tensor:
        seed = torch.Generator("cpu").manual_seed(index)
        return to_pixels(pipe(prompts[index], generator=seed, output_type="latent").images)

    tuned = specdiff.tune(pipe.transformer, draw, prompts=3, target=40)
    tuned.plan.save(Path("plan.json"))

Candidates are plans of dense and skipped evaluations. Thousands are rehearsed on dense pictures,
which costs no evaluation (`Rehearsal`); what promises most is drawn, each in a session of its own,
so that nothing recompiles. `Search` knows nothing of models: it asks for the score of places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from specdiff.errors import OptionError
from specdiff.measure.comparison import psnr
from specdiff.options import check_overrides
from specdiff.plan import Plan
from specdiff.settings import PLAN_OPTIONS
from specdiff.tuning.places import Places
from specdiff.tuning.search import Search
from specdiff.tuning.trials import Closeness, Draw, Likeness, References, Scale, Tell, Trials

TUNED_OPTIONS = tuple(name for name in PLAN_OPTIONS if name != "cache_ratio")
"""Options that a plan may be tuned with: its gaps are skipped."""


@dataclass(frozen=True)
class Tuned:
    """What tuning found."""

    plan: Plan
    score: float
    """Mean likeness over the prompts tuned on, to the solution where `solve` was given, else to the
    dense pictures; infinite if every evaluation is dense, as where nothing else reached the target
    within the budget."""
    checked: float | None
    """The same over the prompts held back; None if there were none, or nothing to check."""
    speedup: float
    """Predicted: time of a dense generation over the plan's, from the steps' times."""
    spent: int
    """Evaluations that tuning has computed."""
    closeness: Closeness | None = None
    """Of the prompts held back, else of those tuned on, on both scales; None with `score`
    infinite."""
    dense_to_solution: Scale | None = None
    """The same prompts' dense pictures, if the solution is known."""


@torch.no_grad()
def tune(
    compiled: nn.Module,
    draw: Draw,
    *,
    target: float | None = None,
    solve: Draw | None = None,
    prompts: int = 3,
    held_back: int = 0,
    likeness: Likeness = psnr,
    budget: int = 1500,
    tell: Tell = lambda spent, line: None,
    **options: Any,
) -> Tuned:
    """The fastest plan whose pictures are as close as `target` says.

    Args:
        compiled: the compiled model, with whatever options its pipeline needs (`guidance_scale`).
        draw: draws prompt number i from a seed of its own: a picture, in 0..1 for PSNR.
        target: mean likeness to keep, in dB by default; finite. None, with `solve` only: as close
            to the solution as the dense pictures are.
        solve: draws the same in very many steps, such as 150. With it closeness to the solution
            counts instead of that to the dense pictures, and the plan is one for the option
            `target="solution"`.
        prompts: how many to tune on, numbers from 0.
        held_back: how many more to check the result on; they count beside the budget.
        likeness: of a picture to another; higher is closer.
        budget: evaluations of the model to spend, each half of guidance one where they are calls of
            their own, those of `solve` none; what is found until then is returned.
        tell: told of every candidate.
        options: `TUNED_OPTIONS`, tuned with and kept in the plan.

    Raises:
        OptionError: An option that plans are not tuned with, or a target that is no number.
        SpecdiffError: The model's evaluations cannot be skipped, the pictures take different
            numbers of them, or more than the budget; says why.
    """
    if not (math.isfinite(target) if target is not None else solve):
        raise OptionError(f"target={target!r}: must be a finite number")
    check_overrides({"plan": Plan((0.0, 1.0), options)})
    if "cache_ratio" in options:
        raise OptionError(
            "cache_ratio: gaps are skipped while a plan is tuned; give it beside the plan"
        )
    trials = Trials(compiled, draw, solve, likeness, budget, options, tell)
    references = trials.references(range(prompts))
    held = trials.beside(range(prompts, prompts + held_back))
    if target is None:
        target = trials.compared(references.dense, references).wanted
    found: dict[Places, Closeness] = {}

    def score(places: Places) -> float:
        found[places] = trials.closeness(places, references)
        trials.require_skips()
        return found[places].wanted

    search = Search(trials.evaluations, score, target, trials.rehearsal.guess())
    search.run()
    checked = _checked(trials, search.best, held)
    shown = held if checked else references
    return _tuned(trials, search, checked, checked or found.get(search.best), shown, prompts)


def _checked(trials: Trials, places: Places, held: References) -> Closeness | None:
    """On other prompts, whatever the budget."""
    if not held.prompts or len(places) == trials.evaluations:
        return None
    trials.budget = math.inf
    return trials.closeness(places, held)


def _tuned(
    trials: Trials,
    search: Search,
    checked: Closeness | None,
    closeness: Closeness | None,
    shown: References,
    prompts: int,
) -> Tuned:
    speedup, score_checked = trials.speedup(search.best), checked.wanted if checked else None
    dense = trials.compared(shown.dense, shown).to_solution
    scales = {
        "to_dense": closeness and closeness.to_dense,
        "to_solution": closeness and closeness.to_solution,
        "dense_to_solution": dense,
    }
    plan = trials.plan(
        search.best,
        score=_finite(search.best_score),
        score_held_back=_finite(score_checked),
        target=search.target,
        prompts=prompts,
        predicted_speedup=round(speedup, 2),
        evaluations_spent=trials.spent,
        **{name: _said(scale) for name, scale in scales.items() if scale},
    )
    return Tuned(plan, search.best_score, score_checked, speedup, trials.spent, closeness, dense)


def _said(scale: Scale) -> dict[str, float | None]:
    found = {"mean": _finite(scale.mean), "worst tenth": _finite(scale.worst_tenth)}
    return {name: None if value is None else round(value, 3) for name, value in found.items()}


def _finite(score: float | None) -> float | None:
    """JSON knows no infinity, the PSNR of equal pictures."""
    return score if score is not None and math.isfinite(score) else None
