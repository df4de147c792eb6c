"""Tuning: the fastest plan that keeps pictures as close to the dense ones as is asked for.

    def draw(index: int) -> Tensor:
        seed = torch.Generator("cpu").manual_seed(index)
        return to_pixels(pipe(prompts[index], generator=seed, output_type="latent").images)

    tuned = specdiff.tune(pipe.transformer, draw, prompts=3, target=40)
    tuned.plan.save(Path("plan.json"))

Candidates are plans of dense and skipped evaluations, each drawn in a session of its own, so that
nothing recompiles. `Search` knows nothing of models: it asks for the score of places.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from specdiff.errors import OptionError, SpecdiffError
from specdiff.measure.comparison import psnr
from specdiff.options import check_overrides
from specdiff.plan import Plan
from specdiff.runtime.api import record, session
from specdiff.runtime.records.recording import Recording, StepRecord
from specdiff.settings import PLAN_OPTIONS

Places = tuple[int, ...]
"""Indices of the dense evaluations, rising from 0."""
Draw = Callable[[int], Tensor]
"""Draws the picture of a prompt, given by its number, always from the same seed: any shape."""
Likeness = Callable[[Tensor, Tensor], float]
"""How close a picture is to the dense one; higher is closer."""
Tell = Callable[[int, str], None]
"""Told of every candidate: evaluations spent so far, and a line."""

TAPER = 1.25
"""How spaced places grow apart: place i of d at (i / (d - 1)) ** TAPER of the way."""
TUNED_OPTIONS = tuple(name for name in PLAN_OPTIONS if name != "cache_ratio")
"""Options that a plan may be tuned with: its gaps are skipped."""
GAIN = 2.5e-4
"""Least gain in score that a move must bring, as a share of the target: 0.01 dB of 40."""


class Spent(Exception):
    """The budget is used up."""


@dataclass
class Search:
    """The fewest dense evaluations, and where, whose score reaches the target.

    Deterministic. Begins with places spaced by a power law, as few as reach the target; then each
    time removes the place that costs least, or spaces anew, and moves single places to their
    neighbours as long as that gains.
    """

    evaluations: int
    score: Callable[[Places], float]
    """Of some places; may raise `Spent`."""
    target: float
    best: Places = ()
    best_score: float = math.inf
    _known: dict[Places, float] = field(default_factory=dict)

    def run(self) -> None:
        """Find `best`; all evaluations if nothing reaches the target."""
        self.best = tuple(range(self.evaluations))
        with contextlib.suppress(Spent):
            self._spaced()
            while len(self.best) > 2 and self._with_one_fewer():
                pass
            self._climb(self.best, math.inf)

    def _spaced(self) -> None:
        """Bisect the number of spaced places."""
        low, high = 1, self.evaluations
        while high - low > 1:
            middle = (low + high) // 2
            if self._score(spaced(self.evaluations, middle)) >= self.target:
                high = middle
            else:
                low = middle

    def _with_one_fewer(self) -> bool:
        fewer = len(self.best) - 1
        starts = [spaced(self.evaluations, fewer), *_with_one_removed(self.best)]
        return self._climb(max(starts, key=self._score), self.target) >= self.target

    def _climb(self, places: Places, target: float) -> float:
        """Move places while that gains, until the target is reached."""
        score, moved = self._score(places), True
        least = GAIN * abs(self.target)
        while moved and score < target:
            moved = False
            for neighbour in self._neighbours(places):
                if (rival := self._score(neighbour)) > score + least:
                    places, score, moved = neighbour, rival, True
                    break
        return score

    def _neighbours(self, places: Places) -> Iterator[Places]:
        """With one place moved by one, the latest places first."""
        for index in range(len(places) - 1, 0, -1):
            for step in (-1, 1):
                moved = places[index] + step
                shifted = tuple(sorted({*places[:index], moved, *places[index + 1 :]}))
                if 0 < moved < self.evaluations and len(shifted) == len(places):
                    yield shifted

    def _score(self, places: Places) -> float:
        if places not in self._known:
            self._known[places] = self.score(places)
        score = self._known[places]
        if score >= self.target and (-len(places), score) > (-len(self.best), self.best_score):
            self.best, self.best_score = places, score
        return score


def spaced(evaluations: int, count: int) -> Places:
    """So many places, further and further apart, the first and (from two on) the last included."""
    last = evaluations - 1
    ideal = [last * (i / max(count - 1, 1)) ** TAPER for i in range(count)]
    placed: list[int] = []
    for index, place in enumerate(ideal):
        low, high = placed[-1] + 1 if placed else 0, last - (count - 1 - index)
        placed.append(min(max(round(place), low), high))
    return tuple(placed)


def _with_one_removed(places: Places) -> list[Places]:
    return [places[:index] + places[index + 1 :] for index in range(len(places) - 1, 0, -1)]


@dataclass(frozen=True)
class Tuned:
    """What tuning found."""

    plan: Plan
    score: float
    """Mean likeness over the prompts tuned on; infinite if every evaluation is dense, as where
    nothing else reached the target within the budget."""
    checked: float | None
    """The same over the prompts held back; None if there were none, or nothing to check."""
    speedup: float
    """Predicted: time of a dense generation over the plan's, from the steps' times."""
    spent: int
    """Evaluations that tuning has computed."""


@dataclass
class _Trials:
    """Draws pictures by plans and counts what that costs."""

    model: nn.Module
    draw: Draw
    likeness: Likeness
    budget: float
    options: dict[str, Any]
    tell: Tell
    evaluations: int = 0
    """Of each generation."""
    runs: int = 0
    """Generations of a picture: two where the halves of guidance are calls of their own."""
    fallbacks: int = 0
    """The most that a picture has had."""
    spent: int = 0
    steps: list[StepRecord] = field(default_factory=list)

    def dense(self, prompt: int) -> Tensor:
        """The picture by which others are judged; also finds how many evaluations there are.

        Raises:
            SpecdiffError: None, one, or not as many as of the pictures before.
        """
        with session(self.model, cache_ratio=0.0), record(self.model) as recording:
            picture = self.draw(prompt).clone()
        self._count(recording)
        self._measure(recording, prompt)
        self.tell(self.spent, f"dense picture {prompt + 1}")
        return picture

    def references(self, prompts: Sequence[int]) -> list[Tensor]:
        """Dense pictures to tune on.

        Raises:
            SpecdiffError: The budget is less than they cost.
        """
        pictures = [self.dense(prompts[0])]
        least = len(prompts) * self.spent
        if least > self.budget:
            raise SpecdiffError(
                f"budget={self.budget}: must be at least {least}, for {len(prompts)} dense pictures"
            )
        return [*pictures, *(self.dense(prompt) for prompt in prompts[1:])]

    def beside(self, prompts: Sequence[int]) -> list[Tensor]:
        """Dense pictures to check the result by, beside the budget.

        Drawn before the search, as one of another length would make it vain.
        """
        spent = self.spent
        pictures = [self.dense(prompt) for prompt in prompts]
        self.budget += self.spent - spent
        return pictures

    def _measure(self, recording: Recording, prompt: int) -> None:
        """Find, or check, how many evaluations a picture takes."""
        indices = [step.index for step in recording.steps if step.index is not None]
        count = max(indices, default=-1) + 1
        if count < 2:
            reasons = {step.reason for step in recording.steps} or {"the model did not run"}
            said = "a picture takes one evaluation" if count else ", ".join(sorted(reasons))
            raise SpecdiffError(f"nothing to tune: {said}")
        if self.evaluations and count != self.evaluations:
            raise SpecdiffError(
                f"picture {prompt + 1} takes {count} evaluations, those before {self.evaluations}:"
                " one plan is tuned on pictures of one length"
            )
        self.evaluations, self.runs = count, max(self.runs, indices.count(0))

    def _count(self, recording: Recording) -> None:
        """Evaluations that a picture has computed."""
        kinds = [step.kind for step in recording.steps]
        ahead = sum(step.speculative for step in recording.steps)
        self.spent += len(kinds) - kinds.count("skipped") + ahead
        self.fallbacks = max(self.fallbacks, kinds.count("fallback"))

    def planned(self, plan: Plan, prompt: int) -> Tensor:
        """The picture by a plan."""
        # Given to the session as well, they outrank what the model was compiled with.
        with session(self.model, plan=plan, **self.options), record(self.model) as recording:
            picture = self.draw(prompt)
        self.steps += recording.steps
        self._count(recording)
        return picture

    def plan(self, places: Places, **notes: Any) -> Plan:
        """What to load for these places."""
        plan = Plan.of(self.evaluations, places, **self.options)
        return Plan(plan.ratios, plan.settings, notes)

    def score(self, places: Places, prompts: Sequence[int], references: Sequence[Tensor]) -> float:
        """Mean likeness; raises `Spent` rather than go over the budget, as far as is known."""
        cost = self.runs * len(places) + self.fallbacks
        if self.spent + len(prompts) * cost > self.budget:
            raise Spent
        plan = self.plan(places)
        score = statistics.fmean(
            self.likeness(self.planned(plan, prompt), reference)
            for prompt, reference in zip(prompts, references, strict=True)
        )
        self.tell(self.spent, f"{len(places)} dense: {score:.4g}")
        return score

    def require_skips(self) -> None:
        """Raise SpecdiffError if guards made every evaluation dense."""
        if self.steps and not any(step.kind == "skipped" for step in self.steps):
            reasons = {step.reason for step in self.steps if step.kind == "fallback"}
            reasons = reasons or {step.reason for step in self.steps}
            raise SpecdiffError(f"no evaluation could be skipped: {', '.join(sorted(reasons))}")

    def speedup(self, places: Places) -> float:
        """Predicted from the median time of dense and of skipped steps."""
        seconds = {
            kind: [step.seconds for step in self.steps if step.kind == kind]
            for kind in ("dense", "skipped")
        }
        if not all(seconds.values()):
            return 1.0
        dense, skipped = (statistics.median(each) for each in seconds.values())
        spent = len(places) * dense + (self.evaluations - len(places)) * skipped
        return self.evaluations * dense / spent


@torch.no_grad()
def tune(
    compiled: nn.Module,
    draw: Draw,
    *,
    target: float,
    prompts: int = 3,
    held_back: int = 0,
    likeness: Likeness = psnr,
    budget: int = 1500,
    tell: Tell = lambda spent, line: None,
    **options: Any,
) -> Tuned:
    """The fastest plan whose pictures are as close to the dense ones as `target` says.

    Args:
        compiled: the compiled model, with whatever options its pipeline needs (`guidance_scale`).
        draw: draws prompt number i from a seed of its own: a picture, in 0..1 for PSNR.
        target: mean likeness to keep, in dB by default; finite.
        prompts: how many to tune on, numbers from 0.
        held_back: how many more to check the result on; they count beside the budget.
        likeness: of a picture to the dense one; higher is closer.
        budget: evaluations of the model to spend, each half of guidance one where they are calls of
            their own; what is found until then is returned.
        tell: told of every candidate.
        options: `TUNED_OPTIONS`, tuned with and kept in the plan.

    Raises:
        OptionError: An option that plans are not tuned with, or a target that is no number.
        SpecdiffError: The model's evaluations cannot be skipped, the pictures take different
            numbers of them, or more than the budget; says why.
    """
    if not math.isfinite(target):
        raise OptionError(f"target={target!r}: must be a finite number")
    check_overrides({"plan": Plan((0.0, 1.0), options)})
    if "cache_ratio" in options:
        raise OptionError(
            "cache_ratio: gaps are skipped while a plan is tuned; give it beside the plan"
        )
    trials = _Trials(compiled, draw, likeness, budget, options, tell)
    numbers, others = range(prompts), range(prompts, prompts + held_back)
    references = trials.references(numbers)
    held = trials.beside(others)

    def score(places: Places) -> float:
        score = trials.score(places, numbers, references)
        trials.require_skips()
        return score

    search = Search(trials.evaluations, score, target)
    search.run()
    return _tuned(trials, search, _checked(trials, search.best, others, held), prompts)


def _tuned(trials: _Trials, search: Search, checked: float | None, prompts: int) -> Tuned:
    speedup = trials.speedup(search.best)
    plan = trials.plan(
        search.best,
        score=_finite(search.best_score),
        score_held_back=_finite(checked),
        target=search.target,
        prompts=prompts,
        predicted_speedup=round(speedup, 2),
        evaluations_spent=trials.spent,
    )
    return Tuned(plan, search.best_score, checked, speedup, trials.spent)


def _finite(score: float | None) -> float | None:
    """JSON knows no infinity, the PSNR of equal pictures."""
    return score if score is not None and math.isfinite(score) else None


def _checked(
    trials: _Trials, places: Places, prompts: Sequence[int], references: Sequence[Tensor]
) -> float | None:
    """The score on other prompts, whatever the budget."""
    if not prompts or len(places) == trials.evaluations:
        return None
    trials.budget = math.inf
    return trials.score(places, prompts, references)
