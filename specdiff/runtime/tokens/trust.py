"""Trust: how far ahead a trajectory is forecast, by how much its last forecast missed.

What a line misses grows with the way that it is followed. Where the last one missed much, the next
is followed less far, whatever the plan says: under strong guidance a trajectory may bend so much
that lines along it lead nowhere.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from torch import Tensor

from specdiff.runtime.sampler.remains import Awaited


@dataclass(frozen=True)
class Miss:
    """What a forecast would have missed of a prediction that was computed."""

    index: int
    """Of the evaluation."""
    span: float
    """Time since the computed prediction before it."""
    missed: Tensor
    """[B, N, C]: the forecast less what was computed."""
    computed: Tensor
    """[B, N, C]"""


class Trust:
    """Of one trajectory."""

    def __init__(self) -> None:
        self.latest: Miss | None = None
        """For calls beside it, which may guide the same latent."""
        self._sent: deque[tuple[int, float, Awaited]] = deque()
        self._reach = math.inf

    def note(self, index: int, span: float, share: Tensor) -> None:
        """Know how much a forecast missed, or know it better.

        Args:
            index: of the present evaluation.
            span: time since the computed prediction before it.
            share: scalar, of what moved the worst row.
        """
        if self._sent and self._sent[-1][0] == index:
            self._sent.pop()
        self._sent.append((index, span, Awaited(share)))

    def reach(self, index: int, lag: int, trusted: float) -> float:
        """How far from the last computed prediction one is forecast at most, in time.

        Args:
            index: of the present evaluation.
            lag: evaluations from one to the reading of what it missed.
            trusted: share of what moves a row that a forecast may miss.
        """
        while self._sent and index - self._sent[0][0] >= lag:
            _, span, awaited = self._sent.popleft()
            missed = awaited.read()
            self._reach = span * trusted / missed if missed else math.inf
        return self._reach
