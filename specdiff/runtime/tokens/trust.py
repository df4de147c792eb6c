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

from specdiff.runtime.sampler.displacement import TINY, guided, norm_of
from specdiff.runtime.sampler.remains import Awaited

TRUSTED = 0.5
"""Share of a prediction that a forecast may miss. Forecasts of smooth trajectories miss a
quarter at most (examples/eval/photos/README.md says what it saves where they do not)."""


class Trust:
    """Of one trajectory."""

    def __init__(self) -> None:
        self._sent: deque[tuple[int, float, Awaited]] = deque()
        self._reach = math.inf

    def note(
        self, index: int, span: float, forecast: Tensor, computed: Tensor, scale: float | None
    ) -> None:
        """At evaluation `index` a prediction was computed, which a forecast would have missed.

        Guidance counts: it makes what is missed larger, and the prediction hardly.

        Args:
            index: of the evaluation.
            span: time since the last computed prediction.
            forecast: [B, N, C].
            computed: the same, by the model.
            scale: of guidance, where the batch holds both halves.
        """
        # Which half comes first is not known here: the way that trusts less.
        pairs = zip(guided(forecast - computed, scale), guided(computed, scale), strict=True)
        shares = [norm_of(missed) / norm_of(whole).clamp_min(TINY) for missed, whole in pairs]
        worst = torch.stack(shares).max()
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
