"""Budget: what generations named by rows keep for forecasts, and which of them gives way.

The one begun first has the fewest steps left to lose. It forgets what it kept, not where it is nor
what forecasts still owe its latent: its next two evaluations are dense.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from specdiff.runtime.streams.registry import Session
from specdiff.runtime.streams.stream import Stream


def keep_within(limit: int | None, sessions: Iterable[Session]) -> None:
    """Let the oldest forget, until all together keep no more than `limit` bytes; note what is kept.

    Called between evaluations, by whoever runs them: nothing else may change the streams meanwhile.
    """
    oldest_first = sorted(sessions, key=lambda each: each.number)
    for each in oldest_first:
        each.kept_bytes = sum(map(held_bytes, each.streams()))
    total = sum(each.kept_bytes for each in oldest_first)
    for each in oldest_first:
        for stream in each.streams():
            if limit is None or total <= limit:
                return
            freed = held_bytes(stream)
            stream.make_room()
            freed -= held_bytes(stream)
            each.kept_bytes -= freed
            total -= freed


def held_bytes(stream: Stream) -> int:
    """Bytes of the latents and predictions that a stream holds; memory that two share counts once.

    What a correction of first order adds, two predictions at most, is not counted.
    """
    held: list[Tensor] = [*stream.outputs, *(each.tokens for each in stream.history.computed)]
    held += stream.fit.shortfall.tensors()
    held += [part for each in stream.fit.clean for part in each.parts]
    for seen in stream.trail.seen:
        held += [*seen.latents, *(part for way in seen.predictions for part in way)]
    held += [] if stream.trust.latest is None else [stream.trust.latest.missed]
    storages = [each.untyped_storage() for each in held]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())
