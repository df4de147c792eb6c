"""Trials: pictures by plans, how close they are to others, and what drawing them costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from specdiff.errors import SpecdiffError
from specdiff.measure.comparison import worst_tenth
from specdiff.plan import Plan
from specdiff.runtime.api import record, session
from specdiff.runtime.records.recording import Recording, StepRecord
from specdiff.tuning.places import Places
from specdiff.tuning.rehearsal import Rehearsal
from specdiff.tuning.search import Spent

Draw = Callable[[int], Tensor]
"""Draws the picture of a prompt, given by its number, always from the same seed: any shape."""
Likeness = Callable[[Tensor, Tensor], float]
"""How close a picture is to another; higher is closer."""
Tell = Callable[[int, str], None]
"""Told of every candidate: evaluations spent so far, and a line."""


@dataclass(frozen=True)
class Scale:
    """How close pictures come to others."""

    mean: float
    worst_tenth: float
    """Mean of the worst tenth, one picture at least."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Scale:
        """Of the likeness of each picture."""
        return cls(statistics.fmean(values), worst_tenth(values))


@dataclass(frozen=True)
class References:
    """What pictures are compared with."""

    prompts: Sequence[int]
    dense: Sequence[Tensor]
    solutions: Sequence[Tensor] = ()
    """Where very many steps lead, if that is the target."""


@dataclass(frozen=True)
class Closeness:
    """Pictures by one plan on both scales."""

    to_dense: Scale
    to_solution: Scale | None
    """None if the solution is not known."""

    @property
    def wanted(self) -> float:
        """What is tuned for."""
        return (self.to_solution or self.to_dense).mean


@dataclass
class Trials:
    """Draws pictures by plans and counts what that costs."""

    model: nn.Module
    draw: Draw
    solve: Draw | None
    """Draws in very many steps."""
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
    rehearsal: Rehearsal = field(default_factory=Rehearsal)
    """Of the dense pictures to tune by."""

    @property
    def _aim(self) -> dict[str, Any]:
        return {"target": "solution"} if self.solve else {}

    def dense(self, prompt: int, *, rehearsed: bool = False) -> Tensor:
        """The picture by which others are judged; also finds how many evaluations there are.

        Args:
            prompt: its number.
            rehearsed: whether plans are to be rehearsed on it.

        Raises:
            SpecdiffError: None, one, or not as many as of the pictures before.
        """
        dense = session(self.model, cache_ratio=0.0, target="dense")
        with dense, record(self.model, latents=rehearsed) as recording:
            picture = self.draw(prompt).clone()
        self._count(recording)
        self._measure(recording, prompt)
        if rehearsed:
            self.rehearsal.watch(recording.generations()[0])
        self.tell(self.spent, f"dense picture {prompt + 1}")
        return picture

    def solution(self, prompt: int) -> Tensor:
        """Where very many steps lead; what they cost is no part of the budget."""
        assert self.solve is not None
        with session(self.model, plan=Plan.every(1), target="solution"):
            picture = self.solve(prompt).clone()
        self.tell(self.spent, f"solution {prompt + 1}")
        return picture

    def references(self, prompts: Sequence[int]) -> References:
        """What to tune by.

        Raises:
            SpecdiffError: The budget is less than the dense pictures cost.
        """
        # The solution is not where the dense path leads, and others forecast in other ways.
        rehearsed = self.solve is None and not {"method", "forecast"} & {*self.options}
        pictures = [self.dense(prompts[0], rehearsed=rehearsed)]
        least = len(prompts) * self.spent
        if least > self.budget:
            raise SpecdiffError(
                f"budget={self.budget}: must be at least {least}, for {len(prompts)} dense pictures"
            )
        pictures += [self.dense(prompt, rehearsed=rehearsed) for prompt in prompts[1:]]
        return self._beside(prompts, pictures)

    def beside(self, prompts: Sequence[int]) -> References:
        """What to check the result by, beside the budget.

        Drawn before the search, as a picture of another length would make it vain.
        """
        spent = self.spent
        pictures = [self.dense(prompt) for prompt in prompts]
        self.budget += self.spent - spent
        return self._beside(prompts, pictures)

    def _beside(self, prompts: Sequence[int], dense: Sequence[Tensor]) -> References:
        solutions = [self.solution(prompt) for prompt in prompts] if self.solve else []
        return References(prompts, dense, solutions)

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
        ours = session(self.model, plan=plan, **self._aim, **self.options)
        with ours, record(self.model) as recording:
            picture = self.draw(prompt)
        self.steps += recording.steps
        self._count(recording)
        return picture

    def plan(self, places: Places, **notes: Any) -> Plan:
        """What to load for these places."""
        plan = Plan.of(self.evaluations, places, **self.options)
        return Plan(plan.ratios, plan.settings, notes)

    def closeness(self, places: Places, references: References) -> Closeness:
        """Of pictures by a plan; raises `Spent` rather than go over the budget, if it can tell."""
        cost = self.runs * len(places) + self.fallbacks
        if self.spent + len(references.prompts) * cost > self.budget:
            raise Spent
        plan = self.plan(places)
        found = self.compared([self.planned(plan, p) for p in references.prompts], references)
        self.tell(self.spent, f"{len(places)} dense: {found.wanted:.4g}")
        return found

    def compared(self, pictures: Sequence[Tensor], references: References) -> Closeness:
        """On both scales."""
        to_dense, to_solution = (
            [self.likeness(a, b) for a, b in zip(pictures, others, strict=bool(others))]
            for others in (references.dense, references.solutions)
        )
        return Closeness(Scale.of(to_dense), Scale.of(to_solution) if to_solution else None)

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
