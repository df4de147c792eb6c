"""A stream: the state of one denoising trajectory, in records.

    conditions   what tells its calls from others'            recognition.py, table.py
    place        where it is in a session with times          progress.py
    trail        what its latest evaluations saw and gave     trail.py
    history      the outputs that forecasts start from        step/step.py
    selected     caches and scores of selective steps         step/step.py
    fit          the sampler, and what forecasts cost         step/lookahead.py, step/corrector.py,
                                                              step/integrator.py
    run          its times and weights by a scheduler         step/scheduled.py

On the right who writes each; the table takes caches back, and looking ahead adds its scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from specdiff.program import Signature
from specdiff.runtime.sampler.course import Course
from specdiff.runtime.sampler.displacement import Ways
from specdiff.runtime.sampler.guidance_pair import Joint
from specdiff.runtime.sampler.known_step import FOLLOWED, KnownStep
from specdiff.runtime.sampler.noise import Process
from specdiff.runtime.sampler.observation import Reading
from specdiff.runtime.sampler.remains import ROUNDED, Awaited, Seen
from specdiff.runtime.sampler.sampler_fit import Prediction
from specdiff.runtime.sampler.scale import LearnedScale, read_as_guided
from specdiff.runtime.sampler.scheduler import Run
from specdiff.runtime.streams.caches import Lease
from specdiff.runtime.streams.keys import Conditions
from specdiff.runtime.streams.trail import EVALUATIONS, Trail
from specdiff.runtime.tokens.correction import Correction
from specdiff.runtime.tokens.history import DEPTH as HISTORY
from specdiff.runtime.tokens.history import History
from specdiff.runtime.tokens.shortfall import Shortfall
from specdiff.runtime.tokens.trust import Trust

CORRECTIONS = 2
"""Values for each number of an output that a correction holds: what is missing and withheld."""
LARGE_CHANGE = 0.5
"""Relative change of the latent in one evaluation that only a very long step explains."""


def kept_bytes(signature: Signature) -> int:
    """What forecasting whole steps keeps of one generation at most, caches apart."""
    tokens = signature.tokens
    single = math.prod(tokens.shape) * max(tokens.dtype.itemsize, torch.float32.itemsize)
    ways = 1 if signature.batch % 2 else 2  # to read guidance from the batch
    watched = EVALUATIONS * (1 + ways)  # a latent and its predictions
    return (watched + CORRECTIONS) * single + 2 * HISTORY * tokens.nbytes


@dataclass(frozen=True)
class Place:
    """Where a stream is in a session that was given its times."""

    generation: int
    """Of the session."""
    first: int
    """The stream's first evaluation in it."""
    given: tuple[float, ...]
    """Times of all the stream's evaluations, those to come included."""
    leads: bool = False
    """Whether it was the first of the session's streams in its latest evaluation."""


@dataclass
class Selected:
    """What selective steps need: caches, and which tokens matter."""

    lease: Lease | None = None
    importance: Tensor | None = None
    """float32 [B, N] of the latest evaluation that measured it (the paper's his)."""
    speculative: list[tuple[float, Tensor]] = field(default_factory=list)
    """Times looked ahead to, soonest first, with their importance, float32 [B, N] (fut)."""
    looked_ahead: bool = False

    def future(self, time: float, direction: float) -> Tensor | None:
        """Importance at the nearest speculative time not yet passed, else at the last one."""
        ahead = [
            importance
            for landing, importance in self.speculative
            if (landing - time) * direction >= 0
        ]
        if ahead:
            return ahead[0]
        return self.speculative[-1][1] if self.speculative else None


class CleanPicture(NamedTuple):
    """The clean picture under a latent, as the model saw it."""

    sigma: float
    parts: tuple[Tensor, ...]
    """float32, of each latent that is moved."""


@dataclass
class SamplerState:
    """How the sampler moves the latent, and what forecasts have cost it."""

    sampler: Prediction | None = None
    """Inferred once two evaluations have shown it."""
    correction: Correction | None = None
    shortfall: Shortfall = field(default_factory=Shortfall)
    """What forecasts have cost, where the sampler's weights are known."""
    clean: tuple[CleanPicture, ...] = ()
    """Newest first, at most two, where the sampler draws noise."""
    course: Course | None = None
    """On the way to the solution, if that is the target."""
    first_order: bool = True
    """Whether each step seen so far followed from its own prediction alone."""
    proven: bool = False
    """Whether a step that followed a new prediction has shown such a sampler's order."""
    scale: LearnedScale = field(default_factory=LearnedScale)
    """Of guidance in the batch, where nobody told it."""
    _sent: tuple[int, Awaited] | None = None
    """After how many evaluations the sampler's numbers were sent to the host."""

    def learn(self, sampler: Prediction, evaluations: int) -> None:
        """The sampler was inferred after so many evaluations."""
        self.sampler = sampler
        self._sent = None if sampler.host else (evaluations, Awaited(sampler.numbers))

    def receive(self, evaluations: int) -> None:
        """Know the sampler on the host, an evaluation after its numbers were sent there."""
        if self._sent is not None and self.sampler is not None and evaluations > self._sent[0]:
            self.sampler = self.sampler.fetched(self._sent[1].read())
            self._sent = None

    def explains(self, reading: Reading, start: float, batch: int) -> bool:
        """Whether the step that was read went where the sampler leads, in every row of a batch."""
        seen = reading.joint.moved if reading.joint is not None else reading.moved
        if seen is None or self.sampler is None or self.sampler.chosen is None:
            return False
        process, way = self.sampler.chosen
        known = way < seen.ways and not process.step(start, reading.time)[2]
        if not known or reading.times.differ or not reading.change:
            return False
        rounding = ROUNDED * reading.precision / reading.change
        misfit = seen.misfit(process, way, start, reading.time)
        # as if one row alone missed
        return misfit * math.sqrt(batch) <= FOLLOWED + rounding

    def known_step(self, before: Seen, end: float) -> KnownStep | None:
        """Where the sampler goes, if the host knows it as one that adds no noise of its own."""
        sampler, start = self.sampler, before.time
        if sampler is None or sampler.chosen is None or not sampler.leaves_less(FOLLOWED):
            return None
        process, way = sampler.chosen
        if way >= len(before.predictions) or process.step(start, end)[2]:
            return None
        return KnownStep(way, *map(float, sampler.step(start, end)))

    @property
    def on_course(self) -> bool:
        """Whether the sampler is led to the solution, which leaves nothing to correct."""
        course = self.course
        return course is not None and course.process is not None and not course.refusal


class Stream:
    """One trajectory. A new generation is a new stream. All state is per batch row.

    Args:
        conditions: of its first call.
        history: empty.
        number: how many streams its graph has had before.
    """

    def __init__(self, conditions: Conditions, history: History, number: int) -> None:
        self.conditions = conditions
        self.history = history
        self.number = number
        self.place: Place | None = None
        """None outside of sessions with times."""
        self.run: Run | None = None
        """By a scheduler at hand, if there is one."""
        self.planned: tuple[int, ...] = ()
        """Evaluations that were to be dense by the plan."""
        self.trail = Trail()
        self.trust = Trust()
        """In its forecasts."""
        self.selected = Selected()
        self.fit = SamplerState()
        self.ambiguous = False
        """Whether its calls cannot be told from those of others, and run dense."""
        self.doubtful = False
        """Whether it may be one of several trajectories, for all that is seen: it is one of several
        lanes, or began where another had been and has not yet gone where its prediction leads."""
        self.last_call = 0
        """Of its table."""

    @property
    def times(self) -> list[float]:
        """Of every evaluation so far."""
        return self.trail.times

    @property
    def given(self) -> tuple[float, ...] | None:
        """Times of all evaluations, those to come included, if a session or scheduler gave them."""
        if self.place is not None:
            return self.place.given
        return None if self.run is None else self.run.times

    @property
    def latents(self) -> tuple[Tensor, ...]:
        """Of the previous evaluation."""
        return self.trail.latents

    @property
    def predictions(self) -> Ways:
        """Of the previous evaluation."""
        return self.trail.predictions

    @property
    def joint(self) -> Joint | None:
        """How the sampler came to the latest evaluation, by both halves of guidance."""
        return self.trail.joint

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """Merged outputs [B, N, C] of the last evaluations, newest first."""
        return tuple(step.tokens for step in self.history.steps)

    def relation(
        self, reading: Reading, candidates: Sequence[Process]
    ) -> Literal["continues", "restarts", "foreign"]:
        """How an evaluation relates to this stream, by its time and its latent.

        A reversal of time begins a new generation; so does a repeat of the starting time, unless
        the latent has moved a little, and to where its prediction leads (neighbouring times that
        collide in bf16). Repeated times later on are Heun's. A latent that is far from the previous
        one, and not where its prediction led by any of the candidates, belongs to somebody else;
        that of a doubtful stream need not be far.
        """
        trail = self.trail
        if trail.turns_back(reading.time):
            return "restarts"
        change, first = reading.change, reading.time == trail.times[-1] and not trail.direction
        if first and not 0 < change <= LARGE_CHANGE:
            return "restarts"
        draws = self.run is not None and self.run.fresh is not None
        strange = not draws and reading.is_strange(candidates, trail.times[-1])
        if first and strange:
            return "restarts"
        if strange and (change > LARGE_CHANGE or self.doubtful):
            return "foreign"
        return "continues"

    def learn_scale(self, latents: Sequence[Tensor], lag: int) -> None:
        """Look whether the step to these latents shows the scale of guidance in the batch.

        From where it is known everything is as if it had been told: the sampler is inferred anew.
        """
        scale, batch = self.fit.scale, self.history.batch
        if batch % 2 or not self.trail.seen:
            return
        if scale.look(latents, self.trail.seen[0], batch, lag) and scale.value is not None:
            self.trail.seen = tuple(read_as_guided(each, scale.value) for each in self.trail.seen)
            self.fit = SamplerState(shortfall=self.fit.shortfall, clean=self.fit.clean, scale=scale)

    def become_ambiguous(self, time: float) -> None:
        """Keep nothing but the times, this one the last: its calls run dense from here on."""
        self.ambiguous = True
        self.trail.forget()
        self.trail.times.append(time)
        self.selected, self.fit = Selected(), SamplerState()

    def break_off(self) -> None:
        """What was computed before the present evaluation is no ground for forecasts."""
        self.history.break_off()
        self.fit.correction = self.fit.course = None
        self.fit.shortfall.break_off()
        self.fit.clean = ()

    def make_room(self) -> None:
        """Keep only where it is: two evaluations are dense, and forecasts begin anew."""
        self.break_off()
        self.history.make_room()
        self.trail.forget()
        self.trust.latest = None
