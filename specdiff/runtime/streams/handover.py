"""Handover: a generation goes on in another graph, from where it was.

    guidance ends or begins        the batch is half of what it was, or twice that
    an adapter, skipped layers     another graph of as many rows

The stream that begins there takes over the place in the plan, and what was computed of its rows.
Where guidance begins in calls of its own, it falls in with the half that goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from specdiff.runtime.sampler.remains import EXPLAINED
from specdiff.runtime.streams.stream import Stream

Remains = Callable[[Stream, Sequence[Tensor]], Tensor]
"""(a stream, latents of its batch) -> what of its step there nothing explains."""


def predecessor(
    streams: Iterable[Stream], latents: Sequence[Tensor], time: float, remains: Remains
) -> Stream | None:
    """The stream whose generation goes on with these latents, by time and by where it leads.

    Reads the device for each stream whose latents have such a form.

    Args:
        streams: of other graphs of the model.
        latents: of a call that no stream of its own graph goes on with.
        time: of that call.
        remains: of the streams.
    """
    for stream in sorted(streams, key=lambda each: len(each.times), reverse=True):
        if stream.ambiguous or not stream.times or time == stream.times[-1]:
            continue
        fitted = fitting(latents, stream.latents)
        if fitted is None or stream.trail.turns_back(time):
            continue
        if remains(stream, fitted).item() < EXPLAINED:
            return stream
    return None


def companion(streams: Iterable[Stream], latents: Sequence[Tensor], time: float) -> Stream | None:
    """A stream well under way that was just evaluated at this time with the same latents.

    As the half of guidance that goes on, in calls of their own, where the other half begins. Reads
    the device for streams at this time alone.
    """
    for stream in streams:
        if len(stream.times) < 2 or stream.times[-1] != time or stream.ambiguous:
            continue
        pairs = list(zip(latents, stream.latents, strict=False))
        if pairs and all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs):
            return stream
    return None


def fall_in(stream: Stream, other: Stream, index: int) -> None:
    """A stream that begins keeps step with another: its first evaluation is number `index`."""
    stream.trail.times = other.trail.times[:index]
    stream.run, stream.planned = other.run, other.planned


def fitting(latents: Sequence[Tensor], before: Sequence[Tensor]) -> list[Tensor] | None:
    """The latents with as many rows as those of a stream, which may be half or twice as many."""
    if not before or len(latents) != len(before):
        return None
    fitted = [_of_rows(*pair) for pair in zip(latents, before, strict=True)]
    return [each for each in fitted if each is not None] if None not in fitted else None


def _of_rows(latent: Tensor, before: Tensor) -> Tensor | None:
    if latent.shape[1:] != before.shape[1:] or latent.device != before.device:
        return None
    rows, wanted = len(latent), len(before)
    if wanted == 2 * rows:
        return torch.cat([latent, latent])
    if rows in (wanted, 2 * wanted):
        return latent[:wanted]
    return None


def take_over(stream: Stream, before: Stream) -> None:
    """A stream that begins goes on with the generation of another."""
    stream.trail.times = list(before.trail.times)
    stream.run, stream.planned = before.run, before.planned
    stream.history.inherit(before.history)
