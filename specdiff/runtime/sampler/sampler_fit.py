"""What the sampler does with a prediction, inferred from two evaluations of one trajectory.

Chosen among candidates by how well each fits the step between them (`displacement`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from specdiff.runtime.sampler.displacement import (
    GOOD_FIT,
    POOR_FIT,
    Displacement,
    Scalar,
    columns,
    free_among,
)
from specdiff.runtime.sampler.noise import Process

RATE_TOLERANCE = 3.0
"""Factor by which a flow's fitted step may differ from the step in time, which bf16 rounds."""
ROUNDED = 0.15
"""What rounding adds to a step, root mean square, as a share of what it may add."""


def _limit(seen: Displacement, precision: float) -> Tensor:
    """As of `Prediction`, where times are exact, so that nobody looks again at each step.

    A call that sees only its own half of guidance, which explains a part of a step, must not be
    taken for the sampler.
    """
    rounding = ROUNDED * seen.rounding(precision)
    return (GOOD_FIT**2 + rounding.square()).sqrt().clamp_max(POOR_FIT)


@dataclass(frozen=True)
class Prediction:
    """How the sampler moves the latent, chosen among candidates; all tensors on one device."""

    candidates: tuple[Process, ...]
    best: Tensor
    """int64 scalar: the chosen candidate and way, as an index into [C, W]."""
    rates: Tensor
    """[W]: d latent = rate * d time * prediction, if the best is a flow."""
    residual: Tensor
    """Scalar: of the best."""
    limit: Tensor
    """Scalar: residual of one without noise up to which it tells what forecasts have cost."""
    host: tuple[float, ...] | None = None
    """The same `numbers` on the host, once it knows them."""

    @classmethod
    def infer(
        cls,
        seen: Displacement,
        candidates: tuple[Process, ...],
        start: float,
        end: float,
        unit: int,
        *,
        exact: bool,
        precision: float = 0.0,
    ) -> Prediction:
        """The likeliest candidate.

        Args:
            seen: a step of the sampler.
            candidates: what the trajectory may follow; the first of several that fit alike wins.
            start: the time of the previous latents.
            end: the time of the latents, a different one.
            unit: the time at which a flow's sigma is 1.
            exact: whether the times are; those that a model gets may be rounded (bf16).
            precision: relative rounding of the latents.
        """
        residuals, surprise = seen.fits(candidates, start, end)
        rates = seen.factors / (end - start)
        stray = (rates * unit).abs().log().abs() > math.log(RATE_TOLERANCE)
        refused = free_among(candidates, rates) & stray
        best = surprise.masked_fill(refused, math.inf).argmin()
        residual = residuals.masked_fill(refused, math.inf).flatten().gather(0, best.reshape(1))[0]
        rates = rates if exact else rates.sign() / unit
        limit = _limit(seen, precision) if exact else torch.full_like(residual, POOR_FIT)
        found = cls(candidates, best, rates, residual, limit)
        return found.fetched(found.numbers.tolist()) if seen.on_host else found

    @property
    def numbers(self) -> Tensor:
        """Best, residual, limit and rates, [3 + W]: what to fetch from the device for `fetched`."""
        scalars = torch.stack([self.best.to(self.rates), self.residual, self.limit])
        return torch.cat([scalars, self.rates])

    def fetched(self, numbers: Sequence[float]) -> Prediction:
        """The same, known on the host."""
        return replace(self, host=tuple(numbers))

    @property
    def trusted(self) -> Tensor:
        """Whether the best fits at all, a bool scalar."""
        return self.residual < POOR_FIT

    def jump(self, latent: Tensor, ways: Sequence[Tensor], start: float, end: float) -> Tensor:
        """The latent moved from one time to another in one step, in its dtype.

        Args:
            latent: at `start`.
            ways: its prediction there, read in each of the W ways.
            start: a time.
            end: where to go.
        """
        rows = [each.jump(start, end) for each in self.candidates]
        kept, moved = self._of_best(rows, self.rates)
        # Scalars that were fetched stay on the host: they multiply a tensor on any device.
        result = kept * latent.float()
        for weight, prediction in zip(moved, ways, strict=True):
            result = result + weight * prediction
        return result.to(latent.dtype)

    def step(
        self, start: float, end: float, seen: Displacement | None = None
    ) -> tuple[Scalar, Scalar]:
        """Scalars a and b of the sampler's step x' = a x + b p (+ noise); b is 0 if none fits.

        Args:
            start: a time.
            end: the time of the next evaluation.
            seen: the step, if it was taken: a flow's b is then measured, as times may be rounded.
        """
        if self.chosen is not None:
            return self._known_step(*self.chosen, start, end, seen)
        rates = self.rates
        if seen is not None and end != start:
            rates = torch.where(seen.unexplained < GOOD_FIT, seen.factors / (end - start), rates)
        rows = [each.step(start, end) for each in self.candidates]
        noisy = torch.tensor([variance > 0 for *_, variance in rows], device="cpu")
        noisy = noisy.to(rates.device, non_blocking=True)
        adds_noise = noisy.gather(0, self.best.reshape(1) // len(rates))[0]
        weights = self._of_best([row[:2] for row in rows], rates)
        told = torch.where(adds_noise, self.trusted, self.residual < self.limit)
        return weights[0], weights[1].sum() * told

    def _known_step(
        self, process: Process, way: int, start: float, end: float, seen: Displacement | None
    ) -> tuple[float, float]:
        kept, moved, variance = process.step(start, end)
        assert self.host is not None  # or there would be no process
        _, residual, limit, *rates = self.host
        if residual >= (POOR_FIT if variance else limit):
            return kept, 0.0
        if process.free and seen is not None and end != start and seen.well_explained(way):
            return kept, seen.factor(way)
        return kept, moved * (rates[way] if process.free else 1.0)

    @cached_property
    def chosen(self) -> tuple[Process, int] | None:
        """The best candidate and way, where the host knows them."""
        if self.host is None:
            return None
        best, _, _, *rates = self.host
        candidate, way = divmod(int(best), len(rates))
        return self.candidates[candidate], way

    def leaves_less(self, limit: float) -> bool:
        """Whether the host knows that the best leaves less than this."""
        return self.host is not None and self.host[1] < limit

    def _of_best(self, rows: Sequence[tuple[float, ...]], rates: Tensor) -> tuple[Tensor, Tensor]:
        """Of (a, b) for every candidate the best one's a, and b by way [W], 0 but for its own."""
        kept, moved = columns(rows, rates)
        moved = torch.where(free_among(self.candidates, rates), moved * rates, moved)
        chosen = torch.arange(moved.numel(), device=moved.device).reshape(moved.shape) == self.best
        return (kept * chosen).sum(), (moved * chosen).sum(0)
