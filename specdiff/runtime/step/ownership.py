"""Ownership: whose evaluation a call is, or why it is nobody's.

The first line that holds decides; each is a condition and what comes of it.

    in a session with times
      conditions of a stream, or its latent goes on   that stream, its time by count
      by count it begins, or nobody is known          a new stream
    by what is read of time and latent
      unknown conditions, all places taken            nobody's: CROWDED
      conditions of an ambiguous stream               nobody's, until time returns: AMBIGUOUS
      latent or time not finite                       nobody's: NOT_FINITE, TIME_NOT_FINITE
      times that differ where one is needed           nobody's: ROWS_DIFFER, TOKENS_DIFFER
      unknown conditions                              a new stream
      latent far from the stream's, none of its       nobody's: AMBIGUOUS
      time turns back, or starts over                 a new stream in its place
      rows that moved in time each its own way        nobody's: ROWS_DIFFER, TOKENS_DIFFER
      latent stands while time moves                  nobody's: STILL
      else                                            the stream that was found
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from specdiff.program import Signature
from specdiff.runtime.sampler.guidance_pair import Joint
from specdiff.runtime.sampler.noise import Process
from specdiff.runtime.sampler.observation import Reading, read
from specdiff.runtime.sampler.remains import EXPLAINED, remains
from specdiff.runtime.sampler.row_times import UnreadTimes, paced
from specdiff.runtime.sampler.sampler_fit import Displacement
from specdiff.runtime.step import fallbacks
from specdiff.runtime.streams.progress import Progress
from specdiff.runtime.streams.recognition import followed
from specdiff.runtime.streams.registry import StreamOwner
from specdiff.runtime.streams.stream import Stream
from specdiff.runtime.streams.table import StreamTable
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
    ) -> None:
        self._signature = signature
        self._inputs = inputs
        self._conditions = [inputs[index] for index in signature.indices("condition")]
        self._owner, self._table, self._progress = owner, table, progress
        self._schedule, self._candidates = schedule, candidates
        self._begin = begin
        self._remains: dict[Stream, Tensor] = {}

    def owner(self) -> Owned | str:
        """The owner of the call; its stream has begun if need be. A reason if there is none."""
        known = self._table.find(self._conditions) or self._followed()
        if known is not None and known.latents and self._schedule.forecasts:
            known.trail.check(self._remains_of(known), timed=self._progress is not None)
        return self._read(known) if self._progress is None else self._counted(known, self._progress)

    def _counted(self, stream: Stream | None, progress: Progress) -> Owned:
        """The owner in a session with times: nothing is read while calls keep their order."""
        index = progress.start(stream, self._time)
        if index is not None:
            stream = self._begin(stream, self._conditions)
            progress.begin(stream, index)
        assert stream is not None and stream.given is not None  # where there is none, one begins
        return Owned(stream, stream.given[len(stream.times)])

    def _read(self, stream: Stream | None) -> Owned | str:
        """The owner by time and latent."""
        reading = self._reading(stream)
        if stream is None and self._table.is_crowded_out(self._conditions, reading.time):
            return fallbacks.CROWDED
        refusal, begins = fallbacks.of_call(
            stream, reading, self._candidates, selects=self._schedule.selects
        )
        if refusal is not None:
            self._abandon(stream, refusal, reading.time)
            return refusal
        if stream is not None and not begins:
            self._table.begun = 0
            stream.doubtful &= reading.time == stream.times[-1]
            return Owned(stream, reading.time, reading)
        new = self._begin(stream, self._conditions)
        self._table.begun += 1
        new.doubtful = stream is not None and (stream.ambiguous or not stream.trail.direction)
        return Owned(new, reading.time, reading)

    def _abandon(self, stream: Stream | None, reason: str, time: float) -> None:
        """Leave no state of a suspicious trajectory but that it is ambiguous, and since when."""
        if stream is not None and reason == fallbacks.AMBIGUOUS:
            stream.become_ambiguous(time)
        elif stream is not None:
            self._table.drop(stream)

    def _followed(self) -> Stream | None:
        """The stream that goes on with conditions which are none of a stream's."""
        return followed(self._table, self._conditions, self._may_be_due, self._explains)

    def _may_be_due(self, stream: Stream) -> bool:
        """Whether a stream may have an evaluation at the time of the call."""
        if self._progress is not None:
            return self._progress.may_go_on(stream)
        return not stream.trail.turns_back(self._time_read)

    def _explains(self, stream: Stream) -> bool:
        """Whether what a stream saw leads to the latents of the call."""
        steps = zip(self._parts, stream.latents, strict=True)
        if all(torch.equal(now, before) for now, before in steps):
            return False  # the other half of guidance, perhaps
        return self._remains_of(stream).item() < EXPLAINED

    def _remains_of(self, stream: Stream) -> Tensor:
        """What of the step to the present evaluation nothing explains that the stream saw."""
        if stream not in self._remains:
            others = self._owner.seen_beside(stream)
            self._remains[stream] = remains(
                self._parts, stream.trail.seen, others, self._signature.batch
            )
        return self._remains[stream]

    def _reading(self, stream: Stream | None) -> Reading:
        times = self._unread_times
        moved = joint = pace = None
        if stream is not None and stream.latents:
            pace = times.pace(stream.trail.row_times)
            ways = tuple(tuple(paced(p, pace) for p in way) for way in stream.predictions)
            moved = Displacement.of(self._parts, stream.latents, ways)
            joint = Joint.of(stream, self._table.partner(stream), self._parts, pace)
        return read(times, self._latent, moved, joint, pace)

    @cached_property
    def _parts(self) -> list[Tensor]:
        """Of the latents, what the sampler moves."""
        return list(self._signature.moving_parts(self._inputs))

    @property
    def _latent(self) -> Tensor:
        latent = self._inputs[self._signature.latent]
        assert isinstance(latent, Tensor)
        return latent

    @property
    def _time(self) -> object:
        return None if self._signature.time is None else self._inputs[self._signature.time]

    @property
    def _unread_times(self) -> UnreadTimes:
        return UnreadTimes.of(self._time, self._signature.batch, self._latent.device)

    @cached_property
    def _time_read(self) -> float:
        return self._unread_times.read().time
