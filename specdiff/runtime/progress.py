"""Progress: how far a session that was given its times has come, counted, so that nothing is read.

An evaluation of a pipeline may call several graphs, or one with several sets of conditions, such as
the halves of guidance, and not each of them in every evaluation: guidance may end early, an adapter
be switched on half way. Each has a stream of its own, and none is more than one call behind another
unless it was left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from specdiff.runtime.keys import StreamKey
from specdiff.runtime.streams import Stream


class Progress:
    """Where the generation of a session is, by the stream that has come furthest.

    Args:
        times: of all evaluations of a generation.
    """

    def __init__(self, times: tuple[float, ...]) -> None:
        self.times = times
        self._generation = 0
        self._done = 0
        """Evaluations that the furthest stream has made in this generation."""
        self._furthest: StreamKey | None = None
        self._time: StreamKey | None = None
        """Its conditions, and its latest time input."""

    def start(
        self, stream: Stream | None, conditions: Sequence[object], time: object
    ) -> int | None:
        """The evaluation with which a call's stream begins anew; None if the stream goes on.

        Args:
            stream: of these conditions, if the graph has one.
            conditions: of the call.
            time: its time input, None if the graph takes none; read only if a stream turns up in
                the middle of a generation.
        """
        if stream is not None and self._goes_on(stream):
            return None
        if self._done == len(self.times):
            self._generation, self._done = self._generation + 1, 0
        if not self._done or not self._is_alongside(conditions, time):
            return self._done
        return self._done - 1

    def _goes_on(self, stream: Stream) -> bool:
        current, index = stream.generation == self._generation, stream.index
        return current and self._done - 1 <= index < len(self.times)

    def begin(self, stream: Stream, index: int) -> None:
        """A new stream, from this evaluation on."""
        stream.generation, stream.first = self._generation, index
        stream.given = self.times[index:]

    def advance(self, stream: Stream, time: object) -> None:
        """A stream has made an evaluation."""
        if stream.generation == self._generation and stream.index > self._done:
            self._done, self._furthest = stream.index, stream.key
            self._time = StreamKey([time], keep_values=True)

    def _is_alongside(self, conditions: Sequence[object], time: object) -> bool:
        """Whether a stream that turns up belongs to the furthest stream's latest evaluation."""
        if self._furthest is None or self._time is None or time is None:
            return True
        if self._done <= 1 and not self._furthest.is_same(conditions):
            return True  # the usual case, other half of guidance
        return self._time.is_same([time]) or self._time.is_equal([time])
