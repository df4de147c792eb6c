"""Course: one trajectory on its way to the solution, from before its sampler is known."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from specdiff.runtime.sampler.displacement import Displacement
from specdiff.runtime.sampler.learned import Times
from specdiff.runtime.sampler.noise import Process
from specdiff.runtime.sampler.remains import Awaited
from specdiff.runtime.sampler.solution import Solution


class Passed(NamedTuple):
    """An evaluation before the sampler was known."""

    time: float
    computed: Tensor | None
    handed: Tensor


@dataclass
class Course:
    """What `target="solution"` keeps of one trajectory."""

    solution: Solution = field(default_factory=Solution)
    process: Process | None = None
    """How the sampler moves the latent, once the host knows."""
    refusal: str = ""
    """Why its steps are not to be integrated."""
    orders: deque[Awaited] = field(default_factory=deque)
    """What the sampler's latest steps leave of first order, on its way to the host."""
    moves: list[Displacement] = field(default_factory=list)
    """The sampler's steps so far, where the model's times are rounded."""
    learned: Times | None = None
    """All times of the run, before they were rounded, if an earlier run has shown them."""
    _passed: list[Passed] = field(default_factory=list)

    def clock(self, time: float) -> float:
        """In which the sampler's step is linear."""
        found = self.process.clock(time) if self.process is not None else None
        assert found is not None  # or there would be no such process
        return found

    def answer(self, time: float, due: float, computed: Tensor | None) -> Tensor:
        """What the sampler is to get at `time`, for its step to `due`: float32 [B, N, C].

        Args:
            time: of this evaluation.
            due: of the next.
            computed: the prediction [B, N, C], or None where this step computes none.
        """
        for passed in self._passed:
            self._arrive(passed.time, passed.computed)
            self.solution.hand(self.clock(passed.time), passed.handed)
        self._passed.clear()
        self._arrive(time, computed)
        return self.solution.answer(self.clock(time), self.clock(due))

    def hand(self, time: float, computed: Tensor | None, handed: Tensor) -> None:
        """Remember an evaluation and what the sampler got, known or not."""
        if self.process is None:
            self._passed.append(Passed(time, computed, handed))
        else:
            self.solution.hand(self.clock(time), handed)

    def _arrive(self, time: float, computed: Tensor | None) -> None:
        self.solution.arrive(self.clock(time), computed)
