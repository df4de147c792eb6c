"""Budget: what generations named by rows keep for forecasts, and which of them gives way.

The one begun first has the fewest steps left to lose. It forgets what it kept, not where it is: its
next evaluation is dense.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from specdiff.runtime.streams.registry import Session
from specdiff.runtime.streams.stream import Stream


def keep_within(limit: int, sessions: Iterable[Session]) -> None:
    """Let the oldest forget, until all together keep no more bytes than `limit`."""
    oldest_first = sorted(sessions, key=lambda each: each.number)
    held = [(stream, kept_bytes(stream)) for each in oldest_first for stream in each.streams()]
    total = sum(size for _, size in held)
    for stream, size in held:
        if total <= limit:
            return
        stream.make_room()
        total -= size


def kept_bytes(stream: Stream) -> int:
    """Bytes of the latents and predictions that a stream keeps; memory that two share counts once.

    What a correction adds, two predictions at most, is not counted.
    """
    kept: list[Tensor] = [*stream.outputs, *(each.tokens for each in stream.history.computed)]
    for seen in stream.trail.seen:
        kept += [*seen.latents, *(part for way in seen.predictions for part in way)]
    storages = {each.data_ptr(): each.nbytes for each in kept}
    return sum(storages.values())
