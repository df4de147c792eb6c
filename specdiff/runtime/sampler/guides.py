"""Guides: which predictions moved each row, its own and those of rows and calls beside it.

Guidance moves a latent by several predictions of it, u + g (c - u), of which the model sees no more
than rows, or calls of their own. What a forecast misses of them counts as they were mixed: that is
several times as much as each misses alone. The sampler's last step tells the mix, whatever the
scale, the order of the rows, or how the step is made of latent and prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specdiff.runtime.sampler.displacement import TINY, as_float32, guided, norm_of, wide
from specdiff.runtime.sampler.remains import Seen, rows_of, shifts, weights_of

MOST = 8
"""Rows up to which each may guide each other; of more, halves and thirds do."""
RIDGE = 1e-8
"""As of `weights_of`: predictions that are nearly parallel share their weight."""


class Rows(NamedTuple):
    """R rows of one evaluation, and what a forecast would have missed of them."""

    latents: Tensor
    """[R, n]"""
    before: Tensor
    """[R, n], of the evaluation before."""
    predictions: Tensor
    """[R, n], of that one, as the sampler got them."""
    missed: Tensor
    """[R, N, C]: the forecast less what was computed."""
    computed: Tensor
    """[R, N, C]"""

    @classmethod
    def of(
        cls, latents: Sequence[Tensor], before: Seen, missed: Tensor, computed: Tensor
    ) -> Rows | None:
        """Of a batch; None where its latents are not one for each row of predictions."""
        (predictions,), batch = before.predictions, len(computed)
        parts = (latents, before.latents, predictions)
        now, then, moved_by = (rows_of(each, batch) for each in parts)
        if any(len(each) != batch for each in (now, then, moved_by)):
            return None
        return cls(now, then, moved_by, missed, computed)

    def fits(self, other: Rows) -> bool:
        """Whether another call's rows have the same form."""
        pairs = zip(self, other, strict=True)
        return all(a.shape[1:] == b.shape[1:] and a.device == b.device for a, b in pairs)

    def after(self, others: Sequence[Rows]) -> Rows:
        """The rows of other calls, which have the same form, and these."""
        return Rows._make(map(torch.cat, zip(*others, self, strict=True))) if others else self


def shares_missed(rows: Rows) -> Tensor:
    """[R, 1, 1]: of what moves each row, the share that its forecast missed."""
    alone = share(rows.missed, rows.computed)
    if len(rows.computed) == 1:
        return alone
    count = len(rows.computed)
    rolls = range(count) if count <= MOST else (0, *shifts(count))
    weights = _weights(rows, rolls).float().unsqueeze(-1).unsqueeze(-1)
    missed, computed = (
        torch.stack([weights[:, i] * each.roll(by, 0) for i, by in enumerate(rolls)]).sum(0)
        for each in (rows.missed, rows.computed)
    )
    stood = (rows.latents == rows.before).all(1).reshape(-1, 1, 1)
    return torch.where(stood, alone, share(missed, computed))


def shares_by_scale(missed: Tensor, computed: Tensor, scale: float) -> Tensor:
    """[2, B, 1, 1]: the same where the scale is told, with either half as the conditional one.

    Args:
        missed: [B, N, C], of both halves.
        computed: [B, N, C]
        scale: g in u + g (c - u).
    """
    pairs = zip(guided(missed, scale), guided(computed, scale), strict=True)
    return torch.stack([share(*pair) for pair in pairs])


def share(missed: Tensor, computed: Tensor) -> Tensor:
    """[R, 1, 1]: the length of what was missed by that of what was computed, each [R, N, C]."""
    return norm_of(as_float32(missed)) / norm_of(as_float32(computed)).clamp_min(TINY)


def _weights(rows: Rows, rolls: Sequence[int]) -> Tensor:
    """[R, V]: of each row's prediction, and of those so many rows before it."""
    kind = wide(rows.latents.device)
    latents, before, predictions = (each.to(kind) for each in rows[:3])
    step = latents - before
    span = torch.stack([before, *(predictions.roll(by, 0) for by in rolls)], dim=1)
    ridge = max(RIDGE, torch.finfo(kind).eps)
    # what stands still, such as the tokens of a reference picture, is moved by nothing
    return weights_of(span * (step != 0).unsqueeze(1), step, ridge)[:, 1:]
