"""Recognition: the stream that a call continues though its conditions are not those of any.

Whatever a pipeline concatenates, casts or computes at each step is a new tensor: control residuals,
prompts that travel, copies that an offloading hook makes. What goes on is the latent. It went where
the predictions of its stream lead, or it belongs to another stream.

    prompt   the same object or equal values at every call     standing
    control  other values at every call                         varying, from its second change on

The first change of a standing condition, as where the prompt is swapped, is news: that evaluation
is computed, and what was computed before it is no ground for forecasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from specdiff.runtime.streams.stream import Stream


def followed(
    streams: Iterable[Stream],
    conditions: Sequence[object],
    goes_on: Callable[[Stream], bool],
    explains: Callable[[Stream], bool],
) -> dict[Stream, frozenset[int]]:
    """The stream that goes on with a call, and the positions of the conditions that changed.

    Of several, such as the two calls of guidance, the one with the fewest conditions that differ,
    and among equals the one whose turn it is. Where the latent tells nothing, as a sampler's noise
    hides it, those with equal conditions, in the order of their latest calls.

    Args:
        streams: of one graph, in the order of their latest calls.
        conditions: of the call.
        goes_on: whether a stream may have an evaluation at the time of the call.
        explains: whether a stream's latents and predictions lead to those of the call.
    """
    changes = {
        stream: stream.conditions.key.differing(conditions, stream.conditions.varying)
        for stream in streams
        if not stream.ambiguous and stream.latents and goes_on(stream)
    }
    likeliest = sorted(changes, key=lambda each: (len(changes[each]), each.last_call))
    match = next(filter(explains, likeliest), None)
    if match is not None:
        return {match: changes[match]}
    return {stream: changed for stream, changed in changes.items() if not changed}
