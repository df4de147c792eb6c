"""Budget: what generations named by rows keep for forecasts, and which of them gives way.

The one begun first has the fewest steps left to lose. It forgets what it kept, not where it is nor
what forecasts still owe its latent: its next two evaluations are dense.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from specdiff.runtime.streams.registry import Session
from specdiff.runtime.streams.stream import Stream


def keep_within(limit: int, sessions: Iterable[Session]) -> None:
    """Let the oldest forget, until all together keep no more bytes than `limit`."""
    oldest_first = sorted(sessions, key=lambda each: each.number)
    held = [(stream, held_bytes(stream)) for each in oldest_first for stream in each.streams()]
    total = sum(size for _, size in held)
    for stream, size in held:
        if total <= limit:
            return
        stream.make_room()
        total -= size - held_bytes(stream)


def held_bytes(stream: Stream) -> int:
    """Bytes of the latents and predictions that a stream holds; memory that two share counts once.

    What a correction of first order adds, two predictions at most, is not counted.
    """
    held: list[Tensor] = [*stream.outputs, *(each.tokens for each in stream.history.computed)]
    held += stream.fit.shortfall.tensors()
    held += [part for each in stream.fit.clean for part in each.parts]
    for seen in stream.trail.seen:
        held += [*seen.latents, *(part for way in seen.predictions for part in way)]
    storages = [each.untyped_storage() for each in held]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())
