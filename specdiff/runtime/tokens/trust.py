"""Trust: how far ahead a trajectory is forecast, by how much its last forecast missed.

What a line misses grows with the way that it is followed. Where the last one missed much, the next
is followed less far, whatever the plan says: under strong guidance a trajectory may bend so much
that lines along it lead nowhere. Once one has bent much, a sparse plan, which was made for smooth
ones, tells nothing any more: what forecasts miss tells alone where to compute.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from torch import Tensor

from specdiff.runtime.sampler.remains import Awaited

BENT = 0.2
"""Share of what moves a latent: a trajectory of which a forecast missed more bends. Of 16 pictures
each, no emoji does, 11 textures and all photographs do (examples/research/trusting.md)."""
LONG = 0.25
"""What is missed counts by the span it was missed over, to the power of this: long ones cost more
of the latent."""
STRICT = 0.05
"""Share that is trusted up to which the plan is followed all the same: it computes most steps."""
LAST = 2
"""Evaluations at the end that follow the plan: what they miss is never made good."""


@dataclass(frozen=True)
class Miss:
    """What a forecast would have missed of a prediction that was computed."""

    index: int
    """Of the evaluation."""
    span: float
    """Time since the computed prediction before it, 1 from noise to picture."""
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
        self._bends = False

    def note(self, index: int, span: float, share: Tensor) -> None:
        """Know how much a forecast missed, or know it better.

        Args:
            index: of the present evaluation.
            span: since the last computed prediction, 1 from noise to picture.
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
            trusted: share of what moves a row that a forecast may miss over all time.
        """
        while self._sent and index - self._sent[0][0] >= lag:
            _, span, awaited = self._sent.popleft()
            missed = awaited.read()
            self._bends |= missed > BENT
            # missed x / span, by x ** LONG, is as much as is trusted
            self._reach = (trusted * span / missed) ** (1 / (1 + LONG)) if missed else math.inf
        return self._reach

    def forgoes_plan(self, trusted: float) -> bool:
        """Whether what forecasts miss tells alone where to compute, as far as is known."""
        return self._bends and trusted > STRICT
