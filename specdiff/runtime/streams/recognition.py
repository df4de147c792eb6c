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
) -> Stream | None:
    """The stream that goes on with a call, its conditions renewed.

    Of several, such as the two calls of guidance, the one with the fewest conditions that differ,
    and among equals the one whose turn it is. Where the latent tells nothing, as a sampler's noise
    hides it, the only one with equal conditions.

    Args:
        streams: of one graph.
        conditions: of the call.
        goes_on: whether a stream may have an evaluation at the time of the call.
        explains: whether a stream's latents and predictions lead to those of the call.
    """
    candidates = []
    for stream in streams:
        if not stream.ambiguous and stream.latents and goes_on(stream):
            changed = stream.conditions.key.differing(conditions, stream.conditions.varying)
            candidates.append((len(changed), stream.last_call, stream, changed))
    candidates.sort(key=lambda each: each[:2])
    pairs = [(stream, changed) for *_, stream, changed in candidates]
    match = next((pair for pair in pairs if explains(pair[0])), None)
    equal = [pair for pair in pairs if not pair[1]]
    if match is None and len(equal) == 1:
        match = equal[0]
    if match is None:
        return None
    stream, changed = match
    stream.conditions.change(conditions, changed)
    return stream
