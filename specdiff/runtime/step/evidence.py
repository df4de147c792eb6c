"""Evidence: how far what a stream saw explains that the latents of a call are its next ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from specdiff.program import Signature
from specdiff.runtime.sampler.known_step import lengths
from specdiff.runtime.sampler.remains import (
    DEPTH,
    EXPLAINED,
    Awaited,
    Seen,
    precision_of,
    remains,
)
from specdiff.runtime.streams.registry import StreamOwner
from specdiff.runtime.streams.stream import Stream


class Evidence:
    """Of one call.

    Args:
        signature: of the graph.
        inputs: of the call.
        owner: of the streams.
    """

    def __init__(self, signature: Signature, inputs: Sequence[object], owner: StreamOwner) -> None:
        self._signature, self._inputs, self._owner = signature, inputs, owner
        self._known: dict[Stream, Tensor] = {}

    @cached_property
    def latents(self) -> list[Tensor]:
        """Of the call's latents, what the sampler moves."""
        return list(self._signature.moving_parts(self._inputs))

    def explains(self, stream: Stream) -> bool:
        """Whether what a stream saw leads to the latents of the call."""
        steps = zip(self.latents, stream.latents, strict=True)
        if all(torch.equal(now, before) for now, before in steps):
            return False  # the other half of guidance, perhaps
        return self.unexplained(stream).item() < EXPLAINED

    def unexplained(self, stream: Stream) -> Tensor:
        """What of the step to the present evaluation nothing explains that the stream saw."""
        if stream not in self._known:
            self._known[stream] = self._left(stream, self.latents, stream.trail.seen)
        return self._known[stream]

    def of_another(self, stream: Stream, latents: Sequence[Tensor]) -> Tensor:
        """What of another graph's stream's step to these latents nothing explains."""
        return self._left(stream, latents, stream.trail.seen)

    def check_later(self, stream: Stream) -> None:
        """Send to the host what tells whether the step to this call is explained."""
        trail, known, precision = stream.trail, None, None
        if trail.steady and stream not in self._known:
            assert stream.given is not None  # its times are known
            now = stream.given[len(stream.times)]
            known = stream.fit.known_step(trail.seen[0], now)
        if known is not None:
            sent = lengths(self.latents, trail.seen[0], known, moving=trail.moving)
            precision = precision_of(self.latents)
        else:
            sent = self.unexplained(stream)
        trail.check(Awaited(sent), precision, partial(self._unexplained_before, stream))

    def _unexplained_before(self, stream: Stream, ago: int) -> Tensor:
        """The same of the step to an evaluation before the present one."""
        now, *past = stream.trail.seen[ago - 1 :]
        return self._left(stream, now.latents, past)

    def _left(self, stream: Stream, latents: Sequence[Tensor], past: Sequence[Seen]) -> Tensor:
        past = past[:DEPTH]
        others = self._owner.seen_beside(stream, past)
        return remains(latents, past, others, stream.history.batch)
