"""Guidance in calls of its own: what two streams of one latent show of the sampler together.

A pipeline that calls the model with and without the prompt moves its latent by both predictions,
u + g (c - u), of which each stream sees only its own. The latent's step is fitted by the two, so
that g need not be known. Each stream then corrects its own half: the sum of the two halves is what
the sampler makes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from specdiff.runtime.sampler.displacement import TINY, Displacement, Ways
from specdiff.runtime.sampler.row_times import paced


class Half(Protocol):
    """What is read of a stream that may be one half of guidance."""

    @property
    def times(self) -> Sequence[float]:
        """Of all evaluations so far."""

    @property
    def latents(self) -> tuple[Tensor, ...]:
        """Of the latest evaluation."""

    @property
    def predictions(self) -> Ways:
        """Of the latest evaluation, a way."""

    @property
    def outputs(self) -> Sequence[Tensor]:
        """Merged outputs [B, N, C] of the last evaluations, newest first."""

    @property
    def joint(self) -> Joint | None:
        """How the sampler came to the latest evaluation, by both halves."""


@dataclass(frozen=True)
class Joint:
    """A step of the latent that two streams share."""

    moved: Displacement
    """By the mix of both predictions that explains it best."""
    news: Tensor
    """Scalar: relative change of the prediction that the step followed from the one before it."""
    apart: Tensor
    """Scalar: how far latents are apart that should be the same."""

    @classmethod
    def of(
        cls,
        stream: Half,
        other: Half | None,
        latents: Sequence[Tensor],
        pace: Tensor | None = None,
    ) -> Joint | None:
        """Of a stream, whose latents these are now, and the one that may be its other half.

        Rows that move at a pace of their own are seen as if they moved alike.
        """
        if other is None or len(stream.predictions) != 1 or len(other.predictions) != 1:
            return None
        if len(other.times) > len(stream.times):  # called first, it knows of this step already
            known = other.joint
            return known and replace(known, apart=_distance(latents, other.latents))
        outputs = stream.outputs[:2]
        newest, older = outputs[0].float(), outputs[-1].float()
        return cls(
            Displacement.of(latents, stream.latents, (_mixed(latents, stream, other, pace),)),
            torch.dist(newest, older) / torch.linalg.vector_norm(newest),
            _distance(stream.latents, other.latents),
        )

    def values(self) -> list[Tensor]:
        """What to fetch from the device, as scalars, for `fetched`."""
        products = [] if self.moved.on_host else [*self.moved.products.flatten()]
        return [self.apart, self.news.to(self.apart.device), *products]

    def fetched(self, values: Sequence[float]) -> Joint | None:
        """The same on the host; None if the streams do not share their latent."""
        apart, news, *products = values
        if apart != 0:
            return None
        moved = self.moved.fetched(products) if products else self.moved
        return Joint(moved, torch.tensor(news, device="cpu"), torch.tensor(apart, device="cpu"))


def _mixed(
    latents: Sequence[Tensor], stream: Half, other: Half, pace: Tensor | None
) -> tuple[Tensor, ...]:
    """The own plus a share of the difference: what fits the step best, length aside."""
    (own,), (others,) = (
        [[paced(p, pace) for p in way] for way in half.predictions] for half in (stream, other)
    )
    pairs = zip(latents, stream.latents, strict=True)
    step = _flat([new.float() - old.float() for new, old in pairs])
    # what stands still, such as a first frame that is given, is moved by no prediction
    mine = _flat(own).masked_fill(step == 0, 0)
    extra = _flat(others).masked_fill(step == 0, 0) - mine
    along, across = torch.dot(step, mine), torch.dot(step, extra)
    square, cross, rest = torch.dot(mine, mine), torch.dot(mine, extra), torch.dot(extra, extra)
    # Cramer's rule; both numerators of it have the same denominator, which cancels.
    weight, more = along * rest - across * cross, across * square - along * cross
    share = torch.where(weight.abs() > TINY, more / weight, 0.0)
    pairs = zip(own, others, strict=True)
    return tuple(mine + share * (their - mine) for mine, their in pairs)


def _distance(latents: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    distance: Tensor = torch.linalg.vector_norm(_flat(latents) - _flat(others))
    return distance


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.float().flatten() for tensor in tensors])
