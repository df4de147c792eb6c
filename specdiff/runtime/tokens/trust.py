"""Trust: how far ahead a trajectory is forecast, by how much its last forecast missed.

What a line misses grows with the way that it is followed. Where the last one missed much, the next
is followed less far, whatever the plan says: under strong guidance a trajectory may bend so much
that lines along it lead nowhere.
"""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor

from specdiff.runtime.sampler.remains import Awaited

TRUSTED = 0.5
"""Share of a prediction that a forecast may miss. Where forecasts are of use they miss a quarter
(examples/research/worst.md)."""


class Trust:
    """Of one trajectory."""

    def __init__(self) -> None:
        self._sent: deque[tuple[int, float, Awaited]] = deque()
        self._reach = math.inf

    def note(self, index: int, span: float, forecast: Tensor, computed: Tensor) -> None:
        """At evaluation `index` a prediction was computed, which a forecast would have missed.

        Args:
            index: of the evaluation.
            span: time since the last computed prediction.
            forecast: [B, N, C].
            computed: the same, by the model.
        """
        missed, size = (_norm(each) for each in (forecast.float() - computed, computed.float()))
        worst = (missed / size.clamp_min(torch.finfo(size.dtype).tiny)).max()
        self._sent.append((index, span, Awaited(worst)))

    def reach(self, index: int, lag: int) -> float:
        """How far from the last computed prediction one is forecast at most, in time.

        Args:
            index: of the present evaluation.
            lag: evaluations from one to the reading of what it missed.
        """
        while self._sent and index - self._sent[0][0] >= lag:
            _, span, awaited = self._sent.popleft()
            missed = awaited.read()
            self._reach = span * TRUSTED / missed if missed else math.inf
        return self._reach


def _norm(predictions: Tensor) -> Tensor:
    """[B]: of each sample."""
    norm: Tensor = torch.linalg.vector_norm(predictions, dim=(1, 2))
    return norm
