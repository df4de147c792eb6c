"""Lane: what a list of conditions was answered in a run, and forecasts of the answers to come.

The model's answer D for a latent x at noise level sigma is kept as the direction d = (x - D) / sigma
in which the latent moves: d = dx / dsigma, for flows and for noise schedules alike. So Euler's step
is x' = x + (sigma' - sigma) d.

Shapes: a batch of B latents, K lists of conditions, n numbers in a latent.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from specdiff.runtime.tokens.correction import Correction, on_top
from specdiff.runtime.tokens.forecast import forecast
from specdiff.runtime.tokens.history import ComputedOutput, History


class Lane:
    """Answers to the same lists of conditions, at the same place in a sampler's steps.

    Args:
        like: a latent [B, ...].
        present: which of the lists are given; guidance that is off has none.
    """

    def __init__(self, like: Tensor, present: Sequence[bool]) -> None:
        self.shape = like.shape
        self.active: Hashable = None
        """Which conditions were active when it was last computed."""
        self._present = tuple(present)
        self._history = History(len(like), 1, like.device)
        self._correction: Correction | None = None

    @property
    def is_ready(self) -> bool:
        """Whether there is anything to forecast from."""
        return bool(self._history.computed)

    def break_off(self) -> None:
        """What was computed is no ground for forecasts."""
        self._history.break_off()
        self._correction = None

    def settle(self, moved: float | None) -> None:
        """The sampler has stepped: x' = x + moved d; None: not so, or nobody knows."""
        if moved is None:
            self._correction = None
        elif self._correction is not None:
            self._correction.settle(1.0, moved)

    def forecast(self, x: Tensor, sigma: float, clock: float, name: str) -> list[Tensor]:
        """The answers for x [B, ...], none of them computed."""
        tokens = forecast(name, self._history, clock, 1)
        self._history.record_skipped(clock, tokens)
        if self._correction is not None:
            self._correction.hand_out(self._history.computed[0], tokens, clock)
        return self._answers(x, sigma, tokens)

    def record(
        self, x: Tensor, sigma: float, clock: float, answers: Sequence[Tensor], due: float | None
    ) -> list[Tensor]:
        """The answers that were computed, with what forecasts cost the latent on top.

        Args:
            x: [B, ...]
            sigma: of x.
            clock: the time in which forecasts are made.
            answers: the model's, each like x.
            due: by how much sigma moves in the coming step, where that is Euler's; else None.
        """
        given = [
            answer for answer, is_there in zip(answers, self._present, strict=True) if is_there
        ]
        tokens = torch.cat([((x - d).float() / sigma).reshape(len(x), 1, -1) for d in given], dim=2)
        before = self._history.computed
        self._history.record_dense(clock, tokens)
        handed = self._corrected(before, tokens, due)
        if self._correction is not None:
            self._correction.hand_out(self._history.computed[0], handed, clock)
        return list(answers) if handed is tokens else self._answers(x, sigma, handed)

    def _corrected(
        self, before: Sequence[ComputedOutput], tokens: Tensor, due: float | None
    ) -> Tensor:
        newest = self._history.computed[0]
        if due is None or not before:
            self._correction = None if due is None else Correction.none(newest)
            return tokens
        if self._correction is None:
            self._correction = Correction.none(newest)
            return tokens
        older = before[1] if len(before) > 1 else None
        return tokens + on_top(self._correction.collect(before[0], older, newest), 1.0, due)

    def _answers(self, x: Tensor, sigma: float, tokens: Tensor) -> list[Tensor]:
        parts = iter(tokens.chunk(sum(self._present), dim=2))
        return [
            (x - sigma * next(parts).reshape(x.shape)).to(x.dtype) if given else torch.zeros_like(x)
            for given in self._present
        ]
