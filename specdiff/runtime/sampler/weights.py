"""Weights: what a sampler makes of the predictions that it is handed, over a whole run.

A sampler without noise moves the latent by sums, whatever its order: the latent of evaluation i is

    x_i = a_i x_0 + sum over j < i of W[i, j] p_j

Handed predictions of which each is an axis of its own, its latents are the rows of W. This takes
milliseconds, needs no model, and draws no number that a run would have drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PARALLEL = 1e-4
"""Relative distance up to which two columns count as multiples of each other."""


def axis(like: Tensor, index: int) -> Tensor:
    """Zeros like `like` [..., n], but for a 1 in place `index` of the last axis."""
    vector = torch.zeros_like(like)
    vector[..., index] = 1
    return vector


@dataclass(frozen=True, eq=False)
class Weights:
    """Of a run of E evaluations."""

    rows: Tensor
    """W, float64 [E + 1, E] on the host: its last row is the finished latent."""

    @classmethod
    def of(cls, latents: Sequence[Tensor]) -> Weights | None:
        """From the latents of E evaluations and the finished one, each of E + 1 numbers or more.

        Number j is the share of prediction j; those after the last are where no prediction led.
        None where there is something, which the sampler has added, or a number is not finite.
        """
        evaluations = len(latents) - 1
        rows = torch.stack([latent.flatten().double().cpu() for latent in latents])
        if not evaluations or not rows.isfinite().all() or (rows[:, evaluations:] != 0).any():
            return None
        return cls(rows[:, :evaluations].clone())

    @property
    def evaluations(self) -> int:
        """Their number."""
        return self.rows.shape[1]

    @property
    def is_first_order(self) -> bool:
        """Whether each latent follows from the one before and its prediction alone."""
        pairs = ((self.rows[i, :i], self.rows[i + 1, :i]) for i in range(1, self.evaluations))
        return all(_parallel(one, other) is not None for one, other in pairs)

    def due(self, index: int) -> list[float]:
        """Of predictions 0 to `index`, in the latent that follows from the last of them."""
        row: list[float] = self.rows[index + 1, : index + 1].tolist()
        return row

    def ratio(self, index: int, of: int, to: int) -> float | None:
        """By how much more prediction `of` counts than `to` in all latents after `index` + 1.

        None where that differs from latent to latent.
        """
        return _parallel(self.rows[index + 2 :, to], self.rows[index + 2 :, of])


def _parallel(one: Tensor, other: Tensor) -> float | None:
    """By how much more `other` is than `one`; None where they are no multiples."""
    square = float(one @ one)
    ratio = float(other @ one) / square if square else 0.0
    apart = float((other - ratio * one).norm())
    return ratio if apart <= PARALLEL * max(float(other.norm()), 1e-30) else None
