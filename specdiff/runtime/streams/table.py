"""The streams of one graph, and how a call finds its own among them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from specdiff.runtime.streams.keys import Conditions, StreamKey
from specdiff.runtime.streams.stream import Stream
from specdiff.runtime.streams.trail import turns_back
from specdiff.runtime.tokens.history import History

MAX_STREAMS = 8
MAX_REMEMBERED = 32
"""Streams that had to make room for others, of which it is known that they were there."""


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

    def lanes(self, conditions: Sequence[object]) -> list[Stream]:
        """Streams of the same conditions, in the order of their latest calls.

        Those whose conditions have died are dropped.
        """
        self._calls += 1
        if not self._keep_values:
            self._streams = [each for each in self._streams if each.conditions.key.alive]
        return [each for each in self._streams if each.conditions.key.is_same(conditions)]

    def go_on(
        self, stream: Stream, conditions: Sequence[object], changed: frozenset[int] | None
    ) -> None:
        """The present call is a stream's, whose conditions changed at these positions.

        None: they are the same objects.
        """
        if changed is None:
            stream.conditions.stand(self._keep_values)
        else:
            stream.conditions.change(conditions, changed)

    def start(
        self, conditions: Sequence[object], history: History, number: int, replacing: Stream | None
    ) -> Stream:
        """A new stream, in place of an earlier generation or of the one called longest ago."""
        stream = Stream(Conditions(conditions), history, number)
        kept = [other for other in self._streams if other is not replacing]
        if len(kept) == MAX_STREAMS:
            gone = kept.pop(0)
            gone.conditions.key.forget_values()
            self._crowded_out.append((gone.conditions.key, gone.times))
        self._streams = [*kept, stream]
        return stream

    def is_crowded_out(self, conditions: Sequence[object], time: float) -> bool:
        """Whether a call without a stream continues one that had to make room for others.

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
        stream.selected.lease = None

    def release_idle(self, stream: Stream) -> None:
        """Take the caches of streams not called since the previous call of `stream`.

        They have most likely finished. If not, a dense step refills caches for them.
        """
        for other in self._streams:
            if other.last_call < stream.last_call:
                other.selected.lease = None
