"""Run: one run of a sampler, from the first noise level to the last.

    evaluation   one question of the sampler: what is under the noise?
    answer       the model's word on one or more lists of conditions; an evaluation may ask for
                 several answers (patches of guidance do)

The schedule says where an evaluation is, by its sigma, so that it does not matter how many a step
of the sampler takes. Evaluations of one kind are forecast from each other: those at the start of
a step, those in between, and those at a sigma that was evaluated before (Heun).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specdiff.integrations.comfyui.judge import Judge, Misses
from specdiff.integrations.comfyui.lane import Lane, Moment
from specdiff.integrations.comfyui.steps import NEAR, Steps
from specdiff.integrations.comfyui.watch import Watch
from specdiff.runtime.sampler.timeline import unlike_a_flow
from specdiff.runtime.sampler.weights import Weights
from specdiff.runtime.tokens.schedule import Place, Schedule
from specdiff.settings import Settings, why_off

PLANNED = "planned"
FEW = "steps are few, too far apart to forecast"
NEW = "nothing like it was computed before"
NEWS = "its conditions changed"
MISSED = "forecasts miss much, as under strong guidance"
STRAYED = "the latent moved where no prediction leads, as samplers that add noise move it"
WINDOW = "a part of the latent was asked for, as context windows do"
MAGNIFIED = "the sampler magnifies what forecasts miss, as cfg_pp ones do but Euler"
UNEVEN = "the batch is at several noise levels"


@dataclass
class _Evaluation:
    """One evaluation under way."""

    shape: torch.Size
    moment: Moment
    strays: bool
    """Whether the latent came from nowhere."""
    planned: str
    """Why the plan computes it; empty if it does not."""
    asked: int = 0
    """Answers so far."""
    reasons: list[str] = field(default_factory=list)
    """Why answers were computed."""
    parts: list[Tensor] = field(default_factory=list)
    """The answers."""
    misses: Misses = field(default_factory=Misses)


class Run:
    """Decides which evaluations are computed. State of one run, gone with it.

    Args:
        settings: the plan and its options.
        sigmas: the schedule, the end included.
        sampler: its name, for the log.
        steps: what it makes of the answers, if known.
        mask: of inpainting, of the shape of the latent; 1 where it is painted anew.
    """

    def __init__(
        self,
        settings: Settings,
        sigmas: Sequence[float],
        sampler: str,
        steps: Steps | None,
        mask: Tensor | None = None,
    ) -> None:
        self._settings = settings
        self._sigmas = list(sigmas)
        self._schedule = Schedule.of(settings, (1,), selectable=False)
        clocks = [self._clock(sigma) for sigma in self._sigmas[:-1]]
        self._progress = unlike_a_flow(clocks) if clocks else None
        self._sampler = sampler
        self._steps = steps
        self._magnified = MAGNIFIED if steps is not None and steps.magnifies else ""
        self._watch = Watch(mask)
        self._judge = Judge(settings.trusted)
        self._lanes: dict[Hashable, Lane] = {}
        self._visits: Counter[float] = Counter()
        self._counts: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._evaluation: _Evaluation | None = None

    def evaluate(self, x: Tensor, timestep: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """One evaluation: `compute` asks `answer` for what it needs."""
        low, high = timestep.aminmax()
        sigma = float(high)
        uneven = UNEVEN if low != high else ""
        if off := why_off(self._settings) or self._magnified or uneven or _end(sigma):
            return self._untouched(off, compute)
        self._evaluation = evaluation = self._next(x, sigma)
        moment = evaluation.moment
        try:
            guided = compute()
        finally:
            self._evaluation = None
        self._counts["computed" if evaluation.reasons else "forecast"] += 1
        self._reasons.update(evaluation.reasons[:1])
        directions = [
            self._watch.opened((x - each).float() / sigma) for each in (guided, *evaluation.parts)
        ]
        self._judge.note(
            moment.kind, moment.index, directions[0], directions[1:], evaluation.misses
        )
        self._watch.leave(x, sigma, directions)
        return guided

    def answer(
        self, conds: Sequence[Any], x: Tensor, compute: Callable[[], Sequence[Tensor]]
    ) -> Sequence[Tensor]:
        """What the model says to each list of conditions, computed or forecast."""
        now = self._evaluation
        if now is None:
            return compute()
        if x.shape != now.shape:
            now.reasons.append(WINDOW)
            return compute()
        present = [cond is not None for cond in conds]
        key = (now.asked, *present)
        now.asked += 1
        lane = self._lanes.setdefault(key, Lane(x, present))
        active = _active(conds, now.moment.sigma)
        if reason := self._why_computed(lane, active, now):
            now.reasons.append(reason)
            answers = compute()
            known = lane.directions(x, now.moment, answers)
            if self._judge.judges:
                self._note_missed(lane, x, now, known)
            answers = lane.record(x, now.moment, answers, known)
        else:
            answers = lane.forecast(x, now.moment, self._settings.forecast)
        lane.active = active
        now.parts += [answer for answer, is_there in zip(answers, present, strict=True) if is_there]
        return answers

    def summary(self) -> str:
        """What was computed, what was forecast, and why not more; one line."""
        computed, forecast = self._counts["computed"], self._counts["forecast"]
        total = computed + forecast
        ratio = f" ({total / computed:.2f}x)" if computed else ""
        reasons = "; ".join(f"{count} as {why}" for why, count in self._reasons.most_common())
        steps = max(len(self._sigmas) - 1, 0)
        return (
            f"{self._sampler}, {steps} steps, {total} evaluations: {computed} computed,"
            f" {forecast} forecast{ratio}. Computed: {reasons or 'none'}"
        )

    def _untouched(self, reason: str, compute: Callable[[], Tensor]) -> Tensor:
        """Acceleration is off for this evaluation."""
        self._counts["computed"] += 1
        self._reasons[reason] += 1
        for lane in self._lanes.values():
            lane.break_off()
        return compute()

    def _next(self, x: Tensor, sigma: float) -> _Evaluation:
        """The evaluation at this noise level, by its place in the schedule."""
        steps = self._sigmas[:-1]
        index = min(range(len(steps)), key=lambda i: abs(steps[i] - sigma))
        on_schedule = abs(steps[index] - sigma) <= NEAR * abs(sigma)
        if not on_schedule and index and (sigma - steps[index]) * (steps[-1] - steps[0]) < 0:
            index -= 1  # between the one before and this one
        place = Place.known(index, len(steps), self._progress)
        is_dense, _ = self._schedule.decide(place)
        # Samplers that go by log(snr) come back to a sigma but for rounding.
        level = steps[index] if on_schedule else sigma
        kind = (on_schedule, self._visits[level])
        self._visits[level] += 1
        moment = Moment(
            self._visits.total() - 1, sigma, self._clock(sigma), kind, self._weights(sigma)
        )
        strays = self._watch.strays(x)
        planned = PLANNED if is_dense else ""
        reason = FEW if len(steps) <= self._settings.few else planned
        return _Evaluation(x.shape, moment, strays, reason)

    def _clock(self, sigma: float) -> float:
        """The noise from 0 to 1: a flow's own sigma; sigmas of a noise schedule have no end."""
        return sigma / (1 + sigma) if max(self._sigmas) > 1 else sigma

    def _weights(self, sigma: float) -> Weights | None:
        """What the sampler makes of directions, if it is known.

        A sampler that goes elsewhere than foreseen is not known any longer.
        """
        index = self._visits.total() - 1
        if self._steps is not None and not self._steps.is_at(index, sigma):
            self._steps = None
        if self._steps is None or not self._settings.correction:
            return None
        return self._steps.weights

    def _why_computed(self, lane: Lane, active: Hashable, now: _Evaluation) -> str:
        """Why an answer is computed; empty if it is forecast."""
        if now.strays or lane.active != active:
            was_ready = lane.is_ready(now.moment.kind)
            lane.break_off()
            if was_ready and not now.planned:
                return STRAYED if now.strays else NEWS
        if now.planned or not lane.is_ready(now.moment.kind):
            return now.planned or NEW
        moment = now.moment
        return "" if self._judge.reaches(moment.kind, moment.index, lane.span(moment)) else MISSED

    def _note_missed(self, lane: Lane, x: Tensor, now: _Evaluation, known: Tensor) -> None:
        """What forecasts would have missed of directions that were computed."""
        missed = lane.missed(known, now.moment, self._settings.forecast)
        if missed is not None:
            now.misses.span = max(now.misses.span, lane.span(now.moment))
            now.misses.missed += map(self._watch.opened, lane.apart(missed, x))
            now.misses.computed += map(self._watch.opened, lane.apart(known, x))


def _end(sigma: float) -> str:
    return "" if sigma > 0 else "it is at the end of the noise"


def _active(conds: Sequence[Any], sigma: float) -> Hashable:
    """Which conditions, ControlNets and keyframes of adapters act at a noise level."""
    return tuple(
        (i, str(cond.get("uuid")), _acting(cond, sigma))
        for i, each in enumerate(conds)
        for cond in each or ()
        if _within(sigma, cond.get("timestep_start"), cond.get("timestep_end"))
    )


def _acting(cond: Any, sigma: float) -> Hashable:
    """Which of a condition's ControlNets act, and the keyframes of its hooks."""
    controls, control = [], cond.get("control")
    while control is not None:
        spans = getattr(control, "timestep_range", None) or (None, None)
        controls.append(_within(sigma, *spans))
        control = getattr(control, "previous_controlnet", None)
    hooks = getattr(cond.get("hooks"), "hooks", ())
    frames = [getattr(getattr(hook, "hook_keyframe", None), "keyframes", ()) for hook in hooks]
    reached = [sum(frame.start_t >= sigma for frame in each) for each in frames]
    return (tuple(controls), tuple(reached))


def _within(sigma: float, start: float | None, end: float | None) -> bool:
    return (start is None or sigma <= start) and (end is None or sigma >= end)
