"""The trail: what the latest evaluations of a trajectory saw and gave, which explains the next."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specdiff.runtime.sampler.displacement import Ways
from specdiff.runtime.sampler.guidance_pair import Joint
from specdiff.runtime.sampler.known_step import FIRST_ORDER, FOLLOWED, follows
from specdiff.runtime.sampler.observation import Reading
from specdiff.runtime.sampler.remains import DEPTH, UNEXPLAINED, Awaited, Seen
from specdiff.runtime.sampler.row_times import RowTimes

CHECK_LAG = 2
"""Evaluations from one to the reading of what it showed, where nothing may wait for a device."""
EVALUATIONS = DEPTH + CHECK_LAG
"""Evaluations that are kept: as many as a step may follow from, and those since one was checked."""


class Trail:
    """Times of all evaluations; latents and predictions of the latest."""

    def __init__(self) -> None:
        self.times: list[float] = []
        """Of every evaluation so far, in the unit of its source."""
        self.row_times: RowTimes | None = None
        """Of the previous evaluation, if its time was read."""
        self.joint: Joint | None = None
        """How the sampler came to the latest evaluation, where another stream has the other half of
        guidance."""
        self.seen: tuple[Seen, ...] = ()
        """Latents and (guided) predictions of the latest evaluations, newest first: the parts that
        they have in common."""
        self.model_time: Tensor | None = None
        """float32 scalar: the time input of the previous evaluation, if it will be asked for."""
        self.strays = False
        """Whether the latest step that was looked at is unexplained."""
        self.steady = True
        """Whether steps go where they are known to go: what moves, once something stood still."""
        self.bends = False
        """Whether one of those had some of earlier predictions in it, as multistep solvers do."""
        self.moving = False
        """Whether known steps are looked at by what moves alone: one was not followed, perhaps as
        part of the latent is held."""
        self._checks: deque[tuple[Awaited, float | None, bool]] = deque()
        """What was sent to the host, the precision, and whether by what moves; of each step."""
        self._spreads: deque[Awaited] = deque()
        """How far apart the times of rows are."""
        self._rows_apart = False

    @property
    def latents(self) -> tuple[Tensor, ...]:
        """Of the previous evaluation."""
        return self.seen[0].latents if self.seen else ()

    @property
    def predictions(self) -> Ways:
        """Of the previous evaluation."""
        return self.seen[0].predictions if self.seen else ()

    @property
    def direction(self) -> float:
        """-1.0 where time falls, 1.0 where it rises, 0.0 while it has not moved."""
        return direction_of(self.times)

    def turns_back(self, time: float) -> bool:
        """Whether an evaluation at this time runs against those so far."""
        return turns_back(self.times, time)

    def is_ahead_of(self, other: Trail) -> bool:
        """Whether it has come to a later time than another, as that one's time runs."""
        if not self.times or self.times[-1] == other.times[-1]:
            return False
        return not other.turns_back(self.times[-1])

    def returns(self, time: float) -> bool:
        """Whether an evaluation at this time is no later than the first of those so far."""
        return (time - self.times[0]) * self.direction <= 0 and time != self.times[-1]

    def check(
        self, sent: Awaited, precision: float | None, remains_of: Callable[[int], Tensor]
    ) -> None:
        """Read of an earlier step whether it is explained, and later the same of the present one.

        Args:
            sent: what nothing explains of a step; or its lengths, if it was known where it leads.
            precision: relative rounding of the latents of a known step, else None.
            remains_of: what nothing explains of the step to an evaluation so many ago.
        """
        self._checks.append((sent, precision, self.moving))
        if len(self._checks) <= CHECK_LAG:
            return
        sent, precision, moving = self._checks.popleft()
        if precision is None:
            self.strays = sent.read() > UNEXPLAINED
            return
        lengths = sent.read()
        if follows(lengths, precision, FOLLOWED):
            self.strays = False
            self.bends |= not follows(lengths, precision, FIRST_ORDER)
        else:  # waited for; steps from here on are looked at by what moves, or by all there is
            self.steady, self.moving = not moving, True
            self.strays = Awaited(remains_of(CHECK_LAG)).read() > UNEXPLAINED

    def rows_apart(self, time: object, batch: int) -> bool:
        """Whether rows were found at times of their own, two evaluations later off the CPU.

        Args:
            time: the model's time input.
            batch: how many rows there are.
        """
        of_rows = isinstance(time, Tensor) and time.dim() > 0 and len(time) == batch > 1
        if isinstance(time, Tensor) and of_rows and any(time.stride()):
            rows = time if time.dim() == 1 else time.reshape(batch, -1).amax(1)
            if rows.device.type == "cpu":
                self._rows_apart |= len(set(rows.tolist())) > 1
            else:
                low, high = torch.aminmax(rows)
                self._spreads.append(Awaited(high - low))
            if len(self._spreads) > CHECK_LAG:
                self._rows_apart |= self._spreads.popleft().read() > 0
        return self._rows_apart

    def arrive(self, time: float, reading: Reading | None) -> None:
        """The present evaluation has its tokens."""
        self.row_times = None if reading is None else reading.times
        self.joint = None if reading is None else reading.joint
        self.times.append(time)

    def keep(self, seen: Seen, model_time: Tensor | None) -> None:
        """What the present evaluation saw and gave."""
        self.seen = (seen, *self.seen)[:EVALUATIONS]
        self.model_time = model_time

    def forget(self) -> None:
        """All but the times, and steps that were not looked at yet."""
        self.seen, self.joint, self.strays = (), None, False
        self._checks.clear()


def direction_of(times: Sequence[float]) -> float:
    """-1.0 where time falls, 1.0 where it rises, 0.0 while it has not moved."""
    span = times[-1] - times[0]
    return math.copysign(1.0, span) if span else 0.0


def turns_back(times: Sequence[float], time: float) -> bool:
    """Whether an evaluation at this time runs against those so far."""
    return (time - times[-1]) * direction_of(times) < 0
