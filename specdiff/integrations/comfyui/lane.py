"""Lane: what lists of conditions were answered in a run, and forecasts of the answers to come.

The model's answer D for a latent x at noise level sigma is kept as the direction
d = (x - D) / sigma in which the latent moves: d = dx / dsigma, for flows and noise schedules alike.

A forecast q in place of a direction p leaves later latents short of what p would have made of
them. Once the next direction is computed, those in between are known much better, by the parabola
through the last three that were computed. So every answer is handed out with what brings the next
latent to where the better known directions lead; the sampler's own weights say how much that is
(`steps.py`).

Shapes: a batch of B latents, K lists of conditions, n numbers in a latent; directions [B, 1, K n].
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdiff.runtime.tokens.forecast import forecast
from specdiff.runtime.tokens.history import ComputedOutput, History

LARGEST = 1.0
"""What is put on top of a direction, at most, relative to it; more than that is no correction."""


@dataclass(frozen=True)
class Moment:
    """When an answer is given."""

    index: int
    """Of the evaluation."""
    sigma: float
    clock: float
    """The time in which forecasts are made."""
    kind: Hashable
    """Answers of one kind are forecast from each other."""
    weights: Sequence[float] | None
    """Of the directions so far, this one the last, in the next latent; None: not known."""


class Lane:
    """Answers to the same lists of conditions.

    Args:
        like: a latent [B, ...].
        present: which of the lists are given; guidance that is off has none.
    """

    def __init__(self, like: Tensor, present: Sequence[bool]) -> None:
        self.active: Hashable = None
        """Which conditions were active at the latest answer."""
        self._present = tuple(present)
        self._histories: defaultdict[Hashable, History] = defaultdict(
            lambda: History(len(like), 1, like.device)
        )
        self._handed: defaultdict[Hashable, dict[int, tuple[float, Tensor]]] = defaultdict(dict)
        """Forecasts since the last computed answer of a kind: when, and what was handed out."""
        self._short: dict[int, Tensor] = {}
        """By evaluation: what was handed out less than is now known to be right."""

    def is_ready(self, kind: Hashable) -> bool:
        """Whether there is anything to forecast from."""
        return bool(self._histories[kind].computed)

    def break_off(self) -> None:
        """What was computed is no ground for forecasts."""
        self._histories.clear()
        self._handed.clear()
        self._short.clear()

    def forecast(self, x: Tensor, now: Moment, name: str) -> list[Tensor]:
        """The answers for x [B, ...], none of them computed."""
        history = self._histories[now.kind]
        known = forecast(name, history, now.clock, 1)
        history.record_skipped(now.clock, known)
        handed = self._corrected(known, now)
        self._handed[now.kind][now.index] = now.clock, handed
        return self._answers(x, now.sigma, handed)

    def record(self, x: Tensor, now: Moment, answers: Sequence[Tensor]) -> list[Tensor]:
        """The answers that were computed, with what forecasts cost the latent on top."""
        given = [each for each, is_there in zip(answers, self._present, strict=True) if is_there]
        parts = [((x - each).float() / now.sigma).reshape(len(x), 1, -1) for each in given]
        known, history = torch.cat(parts, dim=2), self._histories[now.kind]
        history.record_dense(now.clock, known)
        for index, (clock, handed) in self._handed.pop(now.kind, {}).items():
            self._short[index] = _between(history.computed, clock) - handed
        handed = self._corrected(known, now)
        return list(answers) if handed is known else self._answers(x, now.sigma, handed)

    def _corrected(self, known: Tensor, now: Moment) -> Tensor:
        """`known`, and on top what brings the next latent to where it should be."""
        if now.weights is None:
            return known
        *weights, own = now.weights
        terms = [short * weights[index] for index, short in self._short.items() if weights[index]]
        if not terms or not own:
            return known
        more = torch.stack(terms).sum(0) / own
        if more.norm() > LARGEST * known.norm():
            return known
        self._short[now.index] = -more
        return known + more

    def _answers(self, x: Tensor, sigma: float, directions: Tensor) -> list[Tensor]:
        parts = iter(directions.chunk(sum(self._present), dim=2))
        return [
            (x - sigma * next(parts).reshape(x.shape)).to(x.dtype) if given else torch.zeros_like(x)
            for given in self._present
        ]


def _between(computed: Sequence[ComputedOutput], clock: float) -> Tensor:
    """The direction at a time before the newest computed one, by the parabola through three."""
    times = [each.times for each in computed]
    (newest, before, *older), (t0, t1, *rest) = [each.tokens for each in computed], times
    if t0 == t1:
        return newest
    line = (newest - before) / (t0 - t1)
    value = before + line * (clock - t1)
    if not older or rest[0] in (t0, t1):
        return value
    bend = (line - (before - older[0]) / (t1 - rest[0])) / (t0 - rest[0])
    return value + bend * ((clock - t0) * (clock - t1))
