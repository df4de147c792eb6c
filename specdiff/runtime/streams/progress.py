"""Progress: how far a session that was given its times has come, counted, so that nothing is read.

An evaluation of a pipeline may call several graphs, or one with several sets of conditions, such as
the halves of guidance, and not each of them in every evaluation: guidance may end early, an adapter
be switched on half way. Each has a stream of its own. While they keep their order, they are
counted; where one turns up, or falls behind one that it used to lead, its time input is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from specdiff.runtime.streams.keys import StreamKey
from specdiff.runtime.streams.stream import Place, Stream


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
        self._first = self._latest = _key(None)
        """Time input of this generation's first evaluation, and of the latest; None before it."""

    def start(self, stream: Stream | None, time: object) -> int | None:
        """The evaluation with which a call's stream begins anew; None if the stream goes on.

        Args:
            stream: of the call's conditions, if the graph has one.
            time: its time input, None if the graph takes none.
        """
        if stream is not None and self._goes_on(stream, time):
            return None
        if self._done == len(self.times) or self._is_first(time):
            self._generation, self._done = self._generation + 1, 0
        return self._done - self._is_alongside(time)

    def may_go_on(self, stream: Stream) -> bool:
        """Whether a stream may make an evaluation next, by its place in the generation."""
        return self._index(stream) in (self._done - 1, self._done)

    def begin(self, stream: Stream, index: int) -> None:
        """A new stream, from this evaluation on."""
        stream.place = Place(self._generation, index, self.times[index:])

    def may_hand_over(self, before: Stream, index: int) -> bool:
        """Whether a stream's generation is this one, and its next evaluation would be `index`."""
        return self._index(before) == index

    def take_over(self, stream: Stream) -> None:
        """A new stream has taken over all evaluations so far from another."""
        self.begin(stream, 0)

    def pass_over(self, before: Stream | None, after: Callable[[], Stream], time: object) -> None:
        """Count an evaluation that no stream made; the stream `after` begins with the next one.

        Arguments as of `start`.
        """
        index = self.start(before, time)
        if index is None:
            index = self._index(before)
            assert index is not None  # it goes on
        stream = after()
        self.begin(stream, index + 1)
        self.advance(stream, time)

    def advance(self, stream: Stream, time: object) -> None:
        """A stream has made an evaluation."""
        index = self._index(stream)
        assert stream.place is not None and index is not None  # it has begun
        stream.place = replace(stream.place, leads=index > self._done)
        if stream.place.leads:
            self._done, self._latest = index, _key(time)
        if self._done == 1:
            self._first = self._latest

    def _goes_on(self, stream: Stream, time: object) -> bool:
        index = self._index(stream)
        if index is None or stream.place is None or index >= len(self.times):
            return False
        follows = index == self._done - 1 and (not stream.place.leads or self._is_alongside(time))
        return index == self._done or follows

    def _index(self, stream: Stream | None) -> int | None:
        """Of a stream's next evaluation in the present generation; None if it is of another."""
        if stream is None or stream.place is None or stream.place.generation != self._generation:
            return None
        return stream.place.first + len(stream.times)

    def _is_alongside(self, time: object) -> bool:
        """Whether a call that fits no order belongs to the latest evaluation."""
        return self._done > 0 and (time is None or _is_same(self._latest, time))

    def _is_first(self, time: object) -> bool:
        """Whether such a call begins a generation, as the one before it was cut short."""
        moved = self._done > 1 and self.times[0] != self.times[self._done - 1]
        return moved and time is not None and _is_same(self._first, time)


def _key(time: object) -> StreamKey:
    """Of a time input; of a copy where no version would tell that it has been rewritten."""
    kept = time.clone() if isinstance(time, Tensor) and time.is_inference() else time
    return StreamKey([kept], keep_values=True)


def _is_same(key: StreamKey, time: object) -> bool:
    return not key.differing([time], assumed=())
