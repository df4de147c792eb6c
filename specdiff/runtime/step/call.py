"""One call of a graph that belongs to a stream: what it was given, and what that says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from specdiff.program import Programs
from specdiff.runtime.records.recording import StepRecord
from specdiff.runtime.sampler.displacement import POOR_FIT, Displacement, Scalar
from specdiff.runtime.sampler.fresh import Fresh
from specdiff.runtime.sampler.learned import LearnedTimes
from specdiff.runtime.sampler.noise import Process
from specdiff.runtime.sampler.observation import Reading
from specdiff.runtime.sampler.timeline import of_steps
from specdiff.runtime.streams.caches import CachePool
from specdiff.runtime.streams.registry import ModelState, StreamOwner
from specdiff.runtime.streams.stream import Stream
from specdiff.runtime.streams.table import StreamTable
from specdiff.runtime.streams.time_tables import KnownTimes
from specdiff.runtime.tokens.schedule import Schedule
from specdiff.settings import Settings


@dataclass(frozen=True)
class Call:
    """What one evaluation has to work with; only its stream, counters and record change."""

    programs: Programs
    pool: CachePool
    owner: StreamOwner
    table: StreamTable
    stream: Stream
    state: ModelState
    settings: Settings
    schedule: Schedule
    inputs: Sequence[object]
    time: float
    """Time of this evaluation: the model's input, or the session's list if it gave one."""
    reading: Reading | None
    """What was read from the device; None if the session gave the times."""
    candidates: tuple[Process, ...]
    """What the sampler may be doing."""
    known: KnownTimes
    """Time inputs of earlier generations."""
    learned: LearnedTimes
    """Exact times of earlier generations whose model got rounded ones."""
    record: StepRecord | None = None
    """What is to be kept of this evaluation, if anything records."""

    @property
    def given(self) -> tuple[float, ...] | None:
        """All times of the run, if a session or a scheduler gave them."""
        return self.stream.given

    @property
    def shared(self) -> bool:
        """Whether the batch is the two halves of classifier-free guidance."""
        return self.settings.guidance_scale is not None

    @property
    def may_learn_scale(self) -> bool:
        """Whether the batch may hold guidance of a scale that is yet to be learned."""
        even, told = self.programs.signature.batch % 2 == 0, self.shared
        return even and not told and self.stream.fit.scale.looks

    @cached_property
    def clock(self) -> float | Tensor:
        """Time of this evaluation; of each row, [B, 1], where they are at times of their own.

        By the scheduler where one is followed: the model's time may be rounded.
        """
        if self.reading is not None and self.reading.times.differ:
            return self.reading.times.on_device
        run = self.stream.run
        return self.time if run is None else run.times[self.index]

    def at_pace(self, moved: Scalar) -> Scalar:
        """How far the sampler moves each row, [B, 1], if it moves them by `moved` on average."""
        pace = self.reading.pace if self.reading is not None else None
        return moved if pace is None else moved * pace

    @property
    def latent(self) -> Tensor:
        """The main input that is denoised."""
        latent = self.inputs[self.programs.signature.latent]
        assert isinstance(latent, Tensor)
        return latent

    @property
    def counted(self) -> tuple[float, ...] | None:
        """As `given`, if a session gave them: nothing is read, and the times are exact."""
        return None if self.stream.place is None else self.stream.place.given

    @property
    def corrects(self) -> bool:
        """Whether what forecasts cost the latent is made good by what steps showed."""
        two_a_step = self.given is not None and of_steps(self.given) is not None
        first_order = self.stream.fit.first_order and not two_a_step
        return self._may_correct and first_order and not self.has_weights

    @property
    def has_weights(self) -> bool:
        """Whether it is made good by a scheduler's weights: of whole predictions only."""
        run = self.stream.run
        return (
            run is not None
            and run.weights is not None
            and self._may_correct
            and not self.schedule.selects
            and not self.integrates
            and not isinstance(self.clock, Tensor)
        )

    @cached_property
    def index(self) -> int:
        """Of this evaluation, from 0 where the stream begins."""
        return len(self.stream.times)

    @property
    def fresh(self) -> Fresh | None:
        """The noise that the sampler draws, where that is known and no step selects tokens."""
        run = self.stream.run
        return None if run is None or self.schedule.selects else run.fresh

    @property
    def _may_correct(self) -> bool:
        return (
            self.settings.correction
            and self.fresh is None
            and not (self.integrates and self.stream.fit.on_course)
            and self.schedule.forecasts
            and self.programs.signature.additive
        )

    @property
    def integrates(self) -> bool:
        """Whether the sampler is to be led to the solution."""
        return self.settings.target == "solution"

    @property
    def seen(self) -> Displacement | None:
        """The sampler's step since the previous evaluation, by both halves of guidance if known."""
        if self.reading is None:
            return None
        return self.reading.joint.moved if self.reading.joint else self.reading.moved

    @cached_property
    def strays(self) -> bool:
        """Whether the latest step that was looked at is unexplained.

        Noise of the size that the sampler has been found to add explains it where tokens are
        selected, which see it. Forecasts of whole predictions do not: noise changes these.
        """
        strays, sampler, seen = self.stream.trail.strays, self.stream.fit.sampler, self.seen
        if not strays or seen is None or sampler is None or not sampler.chosen:
            return strays
        if not self.schedule.selects:
            return True
        process, way = sampler.chosen
        start = self.stream.times[-1]
        adds_noise = process.step(start, self.time)[2] > 0
        return not (adds_noise and seen.misfit(process, way, start, self.time) < POOR_FIT)

    @property
    def wants_future(self) -> bool:
        """Whether this generation has yet to look ahead."""
        return (
            self.settings.plan.lookahead > 1
            and not self.stream.selected.looked_ahead
            and self.schedule.selects
            and self.programs.signature.time is not None
        )

    def keep(self, **fields: object) -> None:
        """Fill in fields of the record, if there is one."""
        if self.record is not None:
            for name, value in fields.items():
                setattr(self.record, name, value)
