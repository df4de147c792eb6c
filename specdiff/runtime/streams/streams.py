"""Streams: the state of one denoising trajectory each, and how a call finds its own."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal

from torch import Tensor

from specdiff.runtime.sampler.course import Course
from specdiff.runtime.sampler.guidance_pair import Joint
from specdiff.runtime.sampler.noise import Process
from specdiff.runtime.sampler.observation import Reading
from specdiff.runtime.sampler.remains import UNEXPLAINED, Awaited, Seen
from specdiff.runtime.sampler.row_times import RowTimes
from specdiff.runtime.sampler.sampler_fit import Prediction, Ways
from specdiff.runtime.streams.caches import Lease
from specdiff.runtime.streams.keys import StreamKey
from specdiff.runtime.tokens.correction import Correction
from specdiff.runtime.tokens.history import History

MAX_STREAMS = 8
MAX_REMEMBERED = 32
"""Streams that had to make room for others, of which it is known that they were there."""
CHECK_LAG = 2
"""Evaluations from one to the reading of what it showed, where nothing may wait for a device."""
LARGE_CHANGE = 0.5
"""Relative change of the latent in one evaluation that only a very long step explains."""


class Stream:
    """One trajectory: caches, history, scores. A new generation is a new stream.

    All state is per batch row.
    """

    def __init__(self, key: StreamKey, history: History) -> None:
        self.key = key
        self.history = history
        self.number = 0
        """Counts the streams of a graph."""
        self.times: list[float] = []
        """Time of every evaluation so far, in the unit of its source."""
        self.row_times: RowTimes | None = None
        """Of the previous evaluation, if its time was read."""
        self.given: tuple[float, ...] | None = None
        """Times of all evaluations, those to come included, if the session gave them."""
        self.generation = self.first = 0
        """Of a session with times: its generation, and this stream's first evaluation therein."""
        self.leads = False
        """Whether it was the first of its session's streams in its latest evaluation."""
        self.lease: Lease | None = None
        self.importance: Tensor | None = None
        """float32 [B, N] of the latest evaluation that measured it (the paper's his)."""
        self.speculative: list[tuple[float, Tensor]] = []
        """Times looked ahead to, soonest first, with their importance, float32 [B, N] (fut)."""
        self.looked_ahead = False
        self.trail: tuple[Seen, ...] = ()
        """Latents and (guided) predictions of the latest evaluations, newest first: the parts that
        they have in common."""
        self.varying: frozenset[int] = frozenset()
        """Positions of the conditions that the latest call had changed."""
        self.news = False
        """Whether a condition changed that had stood still."""
        self.strays = False
        """Whether the latest step that was looked at is unexplained."""
        self._checks: deque[Awaited] = deque()
        self.model_time: Tensor | None = None
        """float32 scalar: the time input of the previous evaluation, with a session's times."""
        self.sampler: Prediction | None = None
        """How the sampler moves the latent, once two evaluations have shown it."""
        self.correction: Correction | None = None
        self.course: Course | None = None
        """On its way to the solution, if that is the target."""
        self.first_order = True
        """Whether each step seen so far followed from its own prediction alone."""
        self.joint: Joint | None = None
        """How the sampler came to the latest evaluation, where another stream has the other half of
        guidance."""
        self.proven = False
        """Whether a step that followed a new prediction has shown such a sampler's order."""
        self.ambiguous = False
        self.doubtful = False
        """Whether it may be one of several trajectories, for all that is seen: it began where
        another had been, and has not yet gone where its prediction leads."""
        self.last_call = 0

    @property
    def latents(self) -> tuple[Tensor, ...]:
        """Of the previous evaluation."""
        return self.trail[0].latents if self.trail else ()

    @property
    def predictions(self) -> Ways:
        """Of the previous evaluation."""
        return self.trail[0].predictions if self.trail else ()

    def renew(self, conditions: Sequence[object], changed: frozenset[int]) -> None:
        """The present call goes on with other conditions, changed at these positions."""
        self.key = StreamKey(conditions, keep_values=True)
        self.news = not changed <= self.varying
        self.varying = changed

    def check(self, remains: Tensor, lag: int) -> None:
        """Note what nothing explains of the step to the present evaluation.

        It is read so many evaluations later.
        """
        self._checks.append(Awaited(remains))
        while len(self._checks) > lag:
            self.strays = self._checks.popleft().read() > UNEXPLAINED

    @property
    def direction(self) -> float:
        """-1.0 where time falls, 1.0 where it rises, 0.0 while it has not moved."""
        return direction_of(self.times)

    @property
    def index(self) -> int:
        """Of its next evaluation in its session's generation."""
        return self.first + len(self.times)

    @property
    def on_course(self) -> bool:
        """Whether its sampler is led to the solution, which leaves nothing to correct."""
        course = self.course
        return course is not None and course.process is not None and not course.refusal

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
        if turns_back(self.times, reading.time):
            return "restarts"
        change, first = reading.change, reading.time == self.times[-1] and not self.direction
        if first and not 0 < change <= LARGE_CHANGE:
            return "restarts"
        strange = reading.is_strange(candidates, self.times[-1])
        if first and strange:
            return "restarts"
        if strange and (change > LARGE_CHANGE or self.doubtful):
            return "foreign"
        return "continues"

    def become_ambiguous(self) -> None:
        """Give the caches back: calls of this key cannot be told apart and run dense."""
        self.ambiguous = True
        self.lease = self.importance = self.correction = self.course = self.joint = None
        self.trail = ()
        self.speculative.clear()

    def future(self, time: float) -> Tensor | None:
        """Importance at the nearest speculative time not yet passed, else at the last one."""
        ahead = [
            importance
            for landing, importance in self.speculative
            if (landing - time) * self.direction >= 0
        ]
        if ahead:
            return ahead[0]
        return self.speculative[-1][1] if self.speculative else None


class StreamTable:
    """The streams of one graph for one model or session, in the order they were last called."""

    def __init__(self, *, keep_values: bool) -> None:
        self._keep_values = keep_values
        self._streams: list[Stream] = []
        self._crowded_out: deque[tuple[StreamKey, list[float]]] = deque(maxlen=MAX_REMEMBERED)
        """Keys and times of streams that made room."""
        self._calls = 0
        self.begun = 0
        """Streams begun since one last went on."""

    def find(self, conditions: Sequence[object]) -> Stream | None:
        """The stream of the same conditions, after dropping those whose conditions have died."""
        self._calls += 1
        if not self._keep_values:
            self._streams = [stream for stream in self._streams if stream.key.alive]
        for stream in reversed(self._streams):
            if stream.key.is_same(conditions):
                if not self._keep_values:
                    stream.key.forget_values()  # the objects stand
                stream.news, stream.varying = False, frozenset()
                return stream
        return None

    def start(
        self, conditions: Sequence[object], history: History, replacing: Stream | None
    ) -> Stream:
        """A new stream, in place of an earlier generation or of the one called longest ago."""
        stream = Stream(StreamKey(conditions, keep_values=True), history)
        kept = [other for other in self._streams if other is not replacing]
        if len(kept) == MAX_STREAMS:
            gone = kept.pop(0)
            gone.key.forget_values()
            self._crowded_out.append((gone.key, gone.times))
        self._streams = [*kept, stream]
        return stream

    def is_crowded_out(self, conditions: Sequence[object], time: float) -> bool:
        """Whether a call without a stream goes on with one that others took the place of.

        Were it to start again, another in progress would have to make room. Its time is noted.
        """
        if len(self._streams) < MAX_STREAMS:
            return False
        matching = (times for key, times in reversed(self._crowded_out) if key.is_same(conditions))
        times = next(matching, None)
        if times is None or time == times[0] or turns_back(times, time):
            return False
        times.append(time)
        return True

    def partner(self, stream: Stream) -> Stream | None:
        """The stream last called that may be the other half of guidance in separate calls.

        It was evaluated at the same times, and may have been at the one that comes next.
        """
        count = len(stream.times)
        for other in reversed(self._streams):
            ahead = len(other.times) - count
            if other is not stream and ahead in (0, 1) and other.times[:count] == stream.times:
                return other if other.latents and not other.ambiguous else None
        return None

    def __iter__(self) -> Iterator[Stream]:
        return iter(self._streams)

    def touch(self, stream: Stream) -> None:
        """Note that a stream was evaluated by the current call."""
        stream.last_call = self._calls
        self._streams.remove(stream)
        self._streams.append(stream)

    def drop(self, stream: Stream) -> None:
        """Forget a stream; its caches go back to the pool, even where a traceback keeps it."""
        self._streams.remove(stream)
        stream.lease = None

    def release_idle(self, stream: Stream) -> None:
        """Take the caches of streams not called since the previous call of `stream`.

        They have most likely finished. If not, a dense step refills caches for them.
        """
        for other in self._streams:
            if other.last_call < stream.last_call:
                other.lease = None


def direction_of(times: Sequence[float]) -> float:
    """-1.0 where time falls, 1.0 where it rises, 0.0 while it has not moved."""
    span = times[-1] - times[0]
    return math.copysign(1.0, span) if span else 0.0


def returns(times: Sequence[float], time: float) -> bool:
    """Whether an evaluation at this time is no later than the first of those so far."""
    return (time - times[0]) * direction_of(times) <= 0 and time != times[-1]


def turns_back(times: Sequence[float], time: float) -> bool:
    """Whether an evaluation at this time runs against those so far."""
    return (time - times[-1]) * direction_of(times) < 0
