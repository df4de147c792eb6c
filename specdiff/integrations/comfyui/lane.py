"""Lane: what lists of conditions were answered in a run, and forecasts of the answers to come.

The model's answer D for a latent x at noise level sigma is kept as the direction
d = (x - D) / sigma in which the latent moves: d = dx / dsigma, for flows and noise schedules alike.

What forecasts cost the latent is made good by the sampler's own weights (`steps.py`;
`specdiff.runtime.tokens.shortfall`).

Shapes: a batch of B latents, K lists of conditions, n numbers in a latent; directions [B, 1, K n].
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdiff.runtime.sampler.weights import Weights
from specdiff.runtime.tokens.forecast import forecast
from specdiff.runtime.tokens.history import History
from specdiff.runtime.tokens.shortfall import Shortfall


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
    weights: Weights | None
    """Of the directions in the latents; None: not known."""


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
        self._shortfall = Shortfall()

    def is_ready(self, kind: Hashable) -> bool:
        """Whether there is anything to forecast from."""
        return bool(self._histories[kind].computed)

    def break_off(self) -> None:
        """What was computed is no ground for forecasts."""
        self._histories.clear()
        self._shortfall.break_off()

    def forecast(self, x: Tensor, now: Moment, name: str) -> list[Tensor]:
        """The answers for x [B, ...], none of them computed."""
        history = self._histories[now.kind]
        known = forecast(name, history, now.clock, 1)
        history.record_skipped(now.clock, known)
        handed = self._shortfall.forecast(now.kind, now.index, now.clock, known, now.weights)
        return self._answers(x, now.sigma, handed)

    def span(self, now: Moment) -> float:
        """Time since answers of a kind were computed; 0 if there are none."""
        computed = self._histories[now.kind].computed
        return abs(now.clock - float(computed[0].times)) if computed else 0.0

    def directions(self, x: Tensor, now: Moment, answers: Sequence[Tensor]) -> Tensor:
        """Of the answers that are there, float32 [B, 1, K n]."""
        given = [each for each, is_there in zip(answers, self._present, strict=True) if is_there]
        parts = [((x - each).float() / now.sigma).reshape(len(x), 1, -1) for each in given]
        return torch.cat(parts, dim=2)

    def missed(self, known: Tensor, now: Moment, name: str) -> Tensor | None:
        """What a forecast misses of computed directions; None if there is none to be made."""
        history = self._histories[now.kind]
        return forecast(name, history, now.clock, 1) - known if history.computed else None

    def record(
        self, x: Tensor, now: Moment, answers: Sequence[Tensor], known: Tensor
    ) -> list[Tensor]:
        """The answers that were computed, with what forecasts cost the latent on top.

        Args:
            x: the latent.
            now: when.
            answers: of the model.
            known: their directions.
        """
        history = self._histories[now.kind]
        history.record_dense(now.clock, known)
        handed = self._shortfall.computed(now.kind, now.index, history.computed, now.weights)
        return list(answers) if handed is known else self._answers(x, now.sigma, handed)

    def apart(self, directions: Tensor, like: Tensor) -> list[Tensor]:
        """Directions of each answer that is there, of the shape of a latent."""
        return [part.reshape(like.shape) for part in directions.chunk(sum(self._present), dim=2)]

    def _answers(self, x: Tensor, sigma: float, directions: Tensor) -> list[Tensor]:
        parts = iter(self.apart(directions, x))
        return [
            (x - sigma * next(parts)).to(x.dtype) if given else torch.zeros_like(x)
            for given in self._present
        ]
