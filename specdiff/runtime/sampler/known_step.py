"""Known step: what the sampler's step leaves of x' = a x + b p, where the host knows a and b.

A few operations tell a step that goes on as before, which is nearly every one. Only of the others
`remains` looks at all that may explain them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specdiff.runtime.sampler.displacement import as_float32
from specdiff.runtime.sampler.remains import ROUNDED, UNEXPLAINED, Seen

FOLLOWED = UNEXPLAINED / 2
"""What a row may leave, relative to its step, to be explained: `remains` finds no more in it, for
all that it looks at has x and p in it."""

FIRST_ORDER = 5e-3
"""The same of a step that followed its own prediction alone."""


class KnownStep(NamedTuple):
    """x' = kept x + moved p."""

    way: int
    """In which p is read from the batch."""
    kept: float
    moved: float


def lengths(
    latents: Sequence[Tensor], before: Seen, known: KnownStep, *, moving: bool = False
) -> Tensor:
    """Of each row of all R: what a step leaves, the step, and the latents before it.

    Args:
        latents: of the present evaluation.
        before: the previous one.
        known: the step from there.
        moving: only what moves counts: no prediction moves what is given, such as a first frame.

    Returns:
        float32 [3, R], on the device.
    """
    predictions = before.predictions[known.way]
    triples = zip(latents, before.latents, predictions, strict=True)
    found = [_lengths(*triple, known, moving) for triple in triples]
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def _lengths(
    now: Tensor, before: Tensor, prediction: Tensor, known: KnownStep, moving: bool
) -> Tensor:
    before = as_float32(before)
    step = as_float32(now) - before
    left = torch.add(step, prediction, alpha=-known.moved)
    if known.kept != 1:
        left.add_(before, alpha=1 - known.kept)
    if moving:
        still = step == 0
        left.masked_fill_(still, 0)
        before = before.masked_fill(still, 0)
    vectors = torch.stack([left, step, before])
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=tuple(range(2, vectors.dim())))
    return norms


def follows(lengths: Sequence[Sequence[float]], precision: float, most: float) -> bool:
    """Whether every row of a step, of such lengths, went where it was known to go.

    Args:
        lengths: as of `lengths`, on the host.
        precision: relative rounding of the latents.
        most: what a row may miss, relative to its step.
    """
    rounding = ROUNDED * precision
    return all(
        left <= most * step + rounding * before for left, step, before in zip(*lengths, strict=True)
    )
