"""Ownership: whose evaluation a call is, or why it is nobody's.

The first line that holds decides; each is a condition and what comes of it.

    in a session with times
      rows at times of their own                      nobody's: ROWS_APART
      conditions of a stream, or its latent goes on   that stream, its time by count
      by count it begins, or nobody is known          a new stream, which takes over the place of
                                                      another graph's
    by what is read of time and latent
      unknown conditions, all places taken            nobody's: CROWDED
      a stream of another graph is ahead and led here a new stream that takes its place over
      conditions of an ambiguous stream               nobody's, until time returns: AMBIGUOUS
      latent or time not finite                       nobody's: NOT_FINITE, TIME_NOT_FINITE
      times that differ where one is needed           nobody's: ROWS_DIFFER, TOKENS_DIFFER
      unknown conditions                              a new stream
      latent far from the stream's, none of its       nobody's: AMBIGUOUS
      time turns back, or starts over                 a new stream in its place
      the first time again, with another latent       a new stream beside it: a lane
      rows that moved in time each its own way        nobody's: ROWS_DIFFER, TOKENS_DIFFER
      latent stands while time moves                  nobody's: STILL
      else                                            the stream that was found

Of several lanes with the same conditions the first decides that goes on with the call, else the one
whose turn it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from specdiff.program import Signature
from specdiff.runtime.sampler.displacement import Displacement
from specdiff.runtime.sampler.guidance_pair import Joint
from specdiff.runtime.sampler.noise import Process
from specdiff.runtime.sampler.observation import Reading, read
from specdiff.runtime.sampler.remains import UNEXPLAINED
from specdiff.runtime.sampler.row_times import UnreadTimes, paced
from specdiff.runtime.step import fallbacks
from specdiff.runtime.step.evidence import Evidence
from specdiff.runtime.streams.handover import (
    companion,
    fall_in,
    fitting,
    predecessor,
    take_over,
)
from specdiff.runtime.streams.lanes import due
from specdiff.runtime.streams.progress import Progress
from specdiff.runtime.streams.recognition import followed
from specdiff.runtime.streams.registry import StreamOwner
from specdiff.runtime.streams.stream import Stream
from specdiff.runtime.streams.table import MAX_STREAMS, StreamTable
from specdiff.runtime.streams.trail import CHECK_LAG
from specdiff.runtime.tokens.schedule import Schedule

Begin = Callable[[Stream | None, Sequence[object]], Stream]
"""Makes a new stream of such conditions, in place of an earlier one if given."""


@dataclass(frozen=True)
class Owned:
    """A call that belongs to a trajectory."""

    stream: Stream
    time: float
    """Of the call, in the unit of its source."""
    reading: Reading | None = None
    """What was read from the device; None if the session gave the times."""


@dataclass(frozen=True)
class Verdict:
    """How a call relates to a stream."""

    stream: Stream | None
    """None where none has the conditions."""
    reading: Reading
    """By the latent of the stream's latest evaluation."""
    refusal: str | None
    """Why it is nobody's."""
    begins: bool
    """Whether it begins a generation."""

    @property
    def goes_on(self) -> bool:
        """Whether it is the stream's next evaluation."""
        return self.stream is not None and self.refusal is None and not self.begins


class Inquiry:
    """Finds the owner of one call.

    Args:
        signature: of the graph.
        inputs: of the call.
        owner: of the streams: the model, or the session.
        table: the graph's streams there.
        progress: of a session with times.
        schedule: of the call.
        candidates: what the sampler may be doing.
        begin: makes a stream.
        learns_scale: whether a batch may hold guidance of a scale that nobody told.
    """

    def __init__(
        self,
        signature: Signature,
        inputs: Sequence[object],
        owner: StreamOwner,
        table: StreamTable,
        progress: Progress | None,
        schedule: Schedule,
        candidates: Sequence[Process],
        begin: Begin,
        *,
        learns_scale: bool,
    ) -> None:
        self._signature = signature
        self._inputs = inputs
        self._conditions = [inputs[index] for index in signature.indices("condition")]
        self._owner, self._table, self._progress = owner, table, progress
        self._schedule, self._candidates = schedule, candidates
        self._begin, self._learns_scale = begin, learns_scale
        self._changed: Mapping[Stream, frozenset[int] | None] = {}
        """Streams that the call may belong to; which of their conditions changed, None: none is
        another object."""
        self._evidence = Evidence(signature, inputs, owner)

    def owner(self) -> Owned | str:
        """The owner of the call; its stream has begun if need be. A reason if there is none."""
        lanes = self._table.lanes(self._conditions)
        self._changed = dict.fromkeys(lanes) if lanes else dict(self._followed())
        lanes = list(self._changed)
        if self._progress is not None:
            return self._counted(lanes[-1] if lanes else None, self._progress)
        return self._read(lanes)

    def _counted(self, stream: Stream | None, progress: Progress) -> Owned | str:
        """The owner in a session with times: nothing is read while calls keep their order."""
        index = progress.start(stream, self._time)
        if index is not None:
            stream = self._begin(stream, self._conditions)
            progress.begin(stream, index)
            self._continue(stream, index, progress)
        else:
            assert stream is not None  # where there is none, one begins
            self._go_on(stream)
        if stream.trail.rows_apart(self._time, self._signature.batch):
            return fallbacks.ROWS_APART
        assert stream.given is not None
        return Owned(stream, stream.given[len(stream.times)])

    def _continue(self, stream: Stream, index: int, progress: Progress) -> None:
        """A stream that begins on the way goes on with one of another graph, if there is one."""
        for before in self._owner.beside(self._table) if index else ():
            fits = fitting(self._evidence.latents, before.latents) is not None
            if fits and progress.may_hand_over(before, index):
                take_over(stream, before)
                progress.take_over(stream)
                return
        for other in (*self._owner.beside(self._table), *self._table) if index else ():
            if other is not stream and progress.may_hand_over(other, index + 1):
                fall_in(stream, other, index)
                progress.take_over(stream)
                return

    def _read(self, lanes: Sequence[Stream]) -> Owned | str:
        """The owner by time and latent: of several lanes, the first that goes on with the call."""
        asked = due(lanes, self._time_read) if len(lanes) > 1 else lanes
        verdicts = map(self._verdict, asked) if asked else iter([self._verdict(None)])
        first = next(verdicts)
        verdict = first if first.goes_on else next((v for v in verdicts if v.goes_on), first)
        reading, stream = verdict.reading, verdict.stream
        if stream is None and self._table.is_crowded_out(self._conditions, reading.time):
            return fallbacks.CROWDED
        if verdict.refusal in (None, fallbacks.AMBIGUOUS) and (before := self._ahead(verdict)):
            stream = self._begin(stream, self._conditions)
            take_over(stream, before)
            return Owned(stream, reading.time, self._reading(None))
        if verdict.refusal is not None:
            self._abandon(verdict, asked)
            return verdict.refusal
        if stream is None or verdict.begins:
            return Owned(self._new(stream, lanes, reading), reading.time, reading)
        self._table.begun = 0
        stream.doubtful &= reading.time == stream.times[-1] or len(asked) > 1
        self._go_on(stream, reading)
        return Owned(stream, reading.time, reading)

    def _verdict(self, stream: Stream | None) -> Verdict:
        reading = self._reading(stream)
        refusal, begins = fallbacks.of_call(
            stream, reading, self._candidates, selects=self._schedule.selects
        )
        return Verdict(stream, reading, refusal, begins)

    def _ahead(self, verdict: Verdict) -> Stream | None:
        """A stream of another graph that has come further, if its generation goes on here."""
        own, time = verdict.stream, verdict.reading.time
        if verdict.begins and own is not None:
            return None
        others = self._owner.beside(self._table)
        if own is not None:
            others = [other for other in others if other.trail.is_ahead_of(own.trail)]
        return predecessor(others, self._evidence.latents, time, self._evidence.of_another)

    def _new(self, before: Stream | None, lanes: Sequence[Stream], reading: Reading) -> Stream:
        """A stream that begins: in place of one before it, or beside it in the same round."""
        self._table.begun += 1
        beside = before is not None and before.times == [reading.time] and reading.change > 0
        if beside and len(lanes) < MAX_STREAMS:
            for lane in lanes:
                lane.doubtful = True
            new = self._begin(None, self._conditions)
        else:
            new = self._begin(before, self._conditions)
        others = [*self._owner.beside(self._table), *self._table] if before is None else []
        if other := companion(others, self._evidence.latents, reading.time):
            fall_in(new, other, len(other.times) - 1)
        new.doubtful = before is not None and (before.ambiguous or not before.trail.direction)
        return new

    def _go_on(self, stream: Stream, reading: Reading | None = None) -> None:
        """The call is this stream's."""
        self._table.go_on(stream, self._conditions, self._changed[stream])
        if reading is None and self._learns_scale:
            stream.learn_scale(self._evidence.latents, CHECK_LAG)
        stream.fit.receive(len(stream.times))
        if not stream.latents or not self._schedule.forecasts:
            return
        if reading is None:
            self._evidence.check_later(stream)
        elif stream.fit.explains(reading, stream.times[-1], self._signature.batch):
            stream.trail.strays = False
        else:
            left = self._evidence.unexplained(stream).item()
            stream.trail.strays = left > UNEXPLAINED and not _is_noise(stream, reading, left)

    def _abandon(self, verdict: Verdict, asked: Sequence[Stream]) -> None:
        """Leave no state of suspicious trajectories but that they are ambiguous, and since when."""
        if verdict.refusal == fallbacks.AMBIGUOUS:
            for stream in asked:
                stream.become_ambiguous(verdict.reading.time)
        elif verdict.stream is not None:
            self._table.drop(verdict.stream)

    def _followed(self) -> dict[Stream, frozenset[int]]:
        """Streams that may go on with conditions which are none of theirs, and what changed."""
        return followed(self._table, self._conditions, self._may_be_due, self._evidence.explains)

    def _may_be_due(self, stream: Stream) -> bool:
        """Whether a stream may have an evaluation at the time of the call."""
        if self._progress is not None:
            return self._progress.may_go_on(stream)
        return not stream.trail.turns_back(self._time_read)

    def _reading(self, stream: Stream | None) -> Reading:
        times, latents = self._unread_times, self._evidence.latents
        moved = joint = pace = None
        if stream is not None and stream.latents:
            if self._learns_scale:
                stream.learn_scale(latents, lag=0)  # the time is waited for all the same
            pace = times.pace(stream.trail.row_times)
            ways = tuple(tuple(paced(p, pace) for p in way) for way in stream.predictions)
            moved = Displacement.of(latents, stream.latents, ways)
            joint = Joint.of(stream, self._table.partner(stream), latents, pace)
        return read(times, self._latent, moved, joint, pace)

    @property
    def _latent(self) -> Tensor:
        latent = self._inputs[self._signature.latent]
        assert isinstance(latent, Tensor)
        return latent

    @property
    def _time(self) -> object:
        return None if self._signature.time is None else self._inputs[self._signature.time]

    @cached_property
    def _unread_times(self) -> UnreadTimes:
        return UnreadTimes.of(self._time, self._signature.batch, self._latent.device)

    @cached_property
    def _time_read(self) -> float:
        return self._unread_times.read().time


def _is_noise(stream: Stream, reading: Reading, left: float) -> bool:
    """Whether what is left of the latest step, a share of it, is noise that the sampler drew."""
    run, moved = stream.run, reading.moved
    if run is None or run.fresh is None or moved is None:
        return False
    step = math.sqrt(moved.products[0, 0].item() / moved.size)
    return run.fresh.explains(run.first + len(stream.times) - 1, left * step)
