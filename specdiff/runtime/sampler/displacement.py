"""Displacement: the sampler's last step as inner products, and how well each candidate fits it.

Every sampler step that is known here is linear, x1 = a x0 + b p0 + s noise: the new latent from the
previous one and its prediction. How well (a, b, s) fits follows from a few inner products, which
are fetched from the device together with the time, or stay there where nothing may be fetched.

Shapes: C candidates, W ways in which the batch may hold guidance.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from specdiff.runtime.sampler.noise import Process

POOR_FIT = 0.5
"""Relative residual of the best fit from which on the sampler is taken to be none that is known.

Two unrelated latents give 0.7 or more, Euler in bf16 a few hundredths, and separate CFG calls,
of which each sees only its own half of the guided velocity, up to about 0.5.
"""
GOOD_FIT = 0.1
"""Residual up to which a measured step of a flow is more exact than one from rounded times."""

EVIDENCE = 5.0
"""Log of the likelihood ratio from which on noise does not hide that guidance is the other way."""
NOISE_TOLERANCE = 0.15
"""Relative difference between the noise that a sampler added and the noise that it should have
added, up to which it passes: an unrelated latent of unit variance differs by 0.25 or more in runs
of 20 steps, the sampler's own by a few hundredths, in tiny latents."""

TINY = torch.finfo(torch.float32).tiny

Ways = tuple[tuple[Tensor, ...], ...]
"""The predictions for all latents, float32, once for each way to read guidance from the batch."""


def guided(prediction: Tensor, scale: float | None) -> list[Tensor]:
    """What moves the latent, float32, guided where a scale is given.

    Args:
        prediction: the model's output; with a scale, the halves of classifier-free guidance.
        scale: g in u + g (c - u), or None for no guidance in the batch.

    Returns:
        One tensor, or two: for the unconditional half first, as most pipelines have it, and last.
    """
    if scale is None:
        return [as_float32(prediction)]
    first, second = prediction.float().chunk(2)
    pairs = ((first, second), (second, first))
    return [torch.cat([torch.lerp(u, c, scale)] * 2) for u, c in pairs]


def norm_of(predictions: Tensor) -> Tensor:
    """[B, 1, 1]: of each sample of [B, N, C]."""
    norm: Tensor = torch.linalg.vector_norm(predictions, dim=(1, 2), keepdim=True)
    return norm


def as_float32(tensor: Tensor) -> Tensor:
    """As `Tensor.float`, which costs an operation even where there is nothing to do."""
    return tensor if tensor.dtype is torch.float32 else tensor.float()


Scalar = float | Tensor
"""A number on the host, or one on a device that nothing waits for."""


class Fits(NamedTuple):
    """How well candidates explain one step of a sampler, float [C, W]."""

    residuals: Tensor
    """|x1 - (a x0 + b p)| / |x1 - x0|, where a flow's b is the one that fits best. Of a sampler
    that adds noise, how much that noise differs in size from what it should be, scaled so that
    `POOR_FIT` is the limit, too."""
    surprise: Tensor
    """-2 log likelihood per number, up to a constant, where what a sampler without noise leaves
    unexplained counts as noise; the first way of several has an advantage, in case of doubt."""


@dataclass(frozen=True)
class Displacement:
    """One step of a sampler, as the Gram matrix of its vectors, on the device or fetched from it.

    With s = x1 - x0 the step, x0 the previous latents and p their prediction, the Gram matrix holds
    the products of s, x0 and p. These tell how well x1 = a x0 + b p explains the step, without a
    second look at the latents:

        |x1 - a x0 - b p|² = |s + c x0 - b p|²,  c = 1 - a
            = s·s + c (2 s·x0 + c x0·x0) + b² p·p - 2 b (s·p + c x0·p)

    For a = 1 the best b is s·p / p·p (`factors`); it leaves 1 - (s·p)² / (s·s p·p) of |s|²
    (`unexplained`, squared).
    """

    products: Tensor
    """[2 + W, 2 + W], of the latents' step, the previous latents, their predictions in each way."""
    size: int
    """Numbers in the latents."""
    on_host: bool = False
    """Whether the products were fetched."""

    @classmethod
    def of(cls, latents: Sequence[Tensor], previous: Sequence[Tensor], ways: Ways) -> Displacement:
        """From the previous latents, and their predictions, to the latents; on their device.

        What did not move, such as the tokens of a reference picture, counts for nothing: its
        predictions move nothing.
        """
        steps = [new.float() - old.float() for new, old in zip(latents, previous, strict=True)]
        still = [step == 0 for step in steps]
        moved = [
            [t.float().masked_fill(s, 0) for t, s in zip(tensors, still, strict=True)]
            for tensors in (previous, *ways)
        ]
        # A step of DDIM is small beside what it is the difference of: float32 would hide it.
        vectors = [[t.flatten().to(wide(t.device)) for t in tensors] for tensors in (steps, *moved)]
        size = len(vectors)
        by_cell = {
            (i, j): _dot(vectors[i], vectors[j])
            for i, j in itertools.combinations_with_replacement(range(size), 2)
        }
        cells = itertools.product(range(size), repeat=2)
        products = torch.stack([by_cell[min(cell), max(cell)] for cell in cells])
        return cls(products.reshape(size, size), sum(latent.numel() for latent in latents))

    def fetched(self, products: Sequence[float]) -> Displacement:
        """The same on the host, in float64."""
        cells = torch.tensor(products, dtype=torch.float64, device="cpu")
        return Displacement(cells.reshape(self.products.shape), self.size, on_host=True)

    @property
    def ways(self) -> int:
        """W."""
        return len(self.products) - 2

    @property
    def change(self) -> Tensor:
        """|step| / |previous latent|; exactly 0 where the latent did not move."""
        return (self.products[0, 0] / self._safe(self.products[1, 1])).sqrt()

    def rounding(self, precision: float) -> Tensor:
        """What latents rounded by this may add to the step, relative to its length; a scalar."""
        return 2 * precision / self.change.clamp_min(1e-6)

    @property
    def factors(self) -> Tensor:
        """[W]: least squares of the step on each prediction alone."""
        return self.products[0, 2:] / self._safe(self.products.diagonal()[2:])

    @property
    def unexplained(self) -> Tensor:
        """[W]: share of the step that no multiple of a prediction explains."""
        explained = self.factors * self.products[0, 2:] / self._safe(self.products[0, 0])
        return (1 - explained).clamp_min(0).sqrt()

    def fits(self, candidates: Sequence[Process], start: float, end: float) -> Fits:
        """How well each candidate explains the step from one time to another."""
        rows = [each.step(start, end) for each in candidates]
        kept, moved, variance = columns(rows, self.products)
        moved = torch.where(free_among(candidates, self.products), self.factors, moved)
        square = self._safe(self._square(1 - kept, moved))
        share = (square / self._safe(self.products[0, 0])).sqrt()
        added = variance > 0
        expected = torch.where(added, self._safe(variance * self.size), square)
        ratio = square / expected
        excess = (ratio - 1).abs() * (POOR_FIT / NOISE_TOLERANCE)
        doubt = torch.arange(square.shape[1], device=square.device) * (2 * EVIDENCE / self.size)
        return Fits(torch.where(added, excess, share), expected.log() + ratio + doubt)

    def residual(self, candidates: Sequence[Process], start: float, end: float) -> float:
        """Of the candidate that explains best; products that were fetched."""
        return self.fits(candidates, start, end).residuals.min().item()

    def misfit(self, process: Process, way: int, start: float, end: float) -> float:
        """As the residual of `fits`, of one candidate and way, of products that were fetched."""
        kept, moved, variance = process.step(start, end)
        if process.free:
            moved = self.factor(way)
        cells, predicted, latent = self._cells, 2 + way, 1 - kept
        square = cells[0][0] + latent * (2 * cells[0][1] + latent * cells[1][1])
        square += moved**2 * cells[predicted][predicted]
        square -= 2 * moved * (cells[0][predicted] + latent * cells[1][predicted])
        if variance > 0:
            return abs(square / (variance * self.size) - 1) * (POOR_FIT / NOISE_TOLERANCE)
        return math.sqrt(max(square, TINY) / max(cells[0][0], TINY))

    def factor(self, way: int) -> float:
        """As `factors`, of products that were fetched."""
        predicted = self._cells[2 + way]
        return predicted[0] / max(predicted[2 + way], TINY)

    def well_explained(self, way: int) -> bool:
        """Whether a multiple of the prediction is nearly all of the step; fetched products."""
        share = self.factor(way) * self._cells[0][2 + way] / max(self._cells[0][0], TINY)
        return 1 - share < GOOD_FIT**2

    @cached_property
    def _cells(self) -> list[list[float]]:
        rows: list[list[float]] = self.products.tolist()
        return rows

    def _square(self, latent: Tensor, moved: Tensor) -> Tensor:
        """[C, W]: |step + latent x0 - moved p|², for coefficients [C, 1] and [C, W]."""
        inner = self.products
        square = inner[0, 0] + latent * (2 * inner[0, 1] + latent * inner[1, 1])
        square = square + moved**2 * inner.diagonal()[2:]
        return square - 2 * moved * (inner[0, 2:] + latent * inner[1, 2:])

    def _safe(self, square: Tensor) -> Tensor:
        return square.clamp_min(TINY)


def columns(rows: Sequence[tuple[float, ...]], like: Tensor) -> tuple[Tensor, ...]:
    """Each number of all C rows as [C, 1], of the dtype and on the device of `like`."""
    table = torch.tensor(rows, dtype=like.dtype, device="cpu")
    # Not blocking: a copy to the device must not wait for the work queued there.
    return tuple(table.to(like.device, non_blocking=True).unsqueeze(-1).unbind(1))


def free_among(candidates: Sequence[Process], like: Tensor) -> Tensor:
    """Whose b is measured: bool [C, 1], on the device of `like`."""
    free = torch.tensor([[each.free] for each in candidates], device="cpu")
    return free.to(like.device, non_blocking=True)


def wide(device: torch.device) -> torch.dtype:
    """The widest floats of a device: Apple's have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _dot(vectors: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Inner product of two lists of vectors, as a scalar."""
    # Not as one matrix product, which the device may be allowed to round (TF32).
    pairs = zip(vectors, others, strict=True)
    return torch.stack([torch.dot(vector, other) for vector, other in pairs]).sum()
