"""Correction: what forecasts did to the latent is made good when a token is next computed.

A sampler's step x' = a x + b p, handed a forecast q instead of the prediction p, leaves the latent
short of b (p - q). Once the token is computed again, the predictions in between are known much
better, by the parabola through its last two computed outputs and the new one; what is missing goes
on top of the new output, as much as the sampler's next step turns into just that. Costs no
evaluation. The idea is the corrector of predictor-corrector solvers (UniPC, Zhao et al. 2023,
section 3.2), per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdiff.runtime.sampler.sampler_fit import Scalar
from specdiff.runtime.tokens.forecast import nonzero
from specdiff.runtime.tokens.history import Clock, ComputedOutput


@dataclass
class Correction:
    """What one trajectory's latent is short of, as of its latest evaluation.

    `missing` is exact for a token just computed, and for the others grows by `settle`, under the
    assumption that their output stood still; `lag` times the slope of the output is to be added.
    """

    missing: Tensor
    """float32 [B, N, C]"""
    lag: Tensor
    """float32 [B, N], in time."""
    lag_squared: Tensor
    """float32 [B, N], in time squared: the same of the distance to the last computed output,
    squared, for how the output bends."""
    withheld: Tensor
    """float32 [B, N, C]: last computed output less what was handed out, at the last evaluation."""
    behind: Tensor
    """float32 [B, N]: time of the last evaluation less that of the last computed output."""

    @classmethod
    def none(cls, newest: ComputedOutput) -> Correction:
        """Of a trajectory whose first evaluation gave `newest`."""
        zeros = torch.zeros_like(newest.tokens, dtype=torch.float32)
        times = torch.zeros_like(newest.times)
        return cls(zeros, times, times, zeros, times)

    def settle(self, kept: Scalar, moved: Scalar) -> None:
        """The sampler has stepped: x' = kept x + moved p, each row as far as it was, [B, 1]."""
        self.missing = self.missing * kept + self.withheld * _over_channels(moved)
        self.lag = self.lag * kept + self.behind * moved
        self.lag_squared = self.lag_squared * kept + self.behind.square() * moved

    def collect(
        self, before: ComputedOutput, older: ComputedOutput | None, after: ComputedOutput
    ) -> Tensor:
        """What tokens that were just computed lack; zero for the others.

        Args:
            before: each token's last computed output before this evaluation.
            older: the one before that, if there was one.
            after: the last one, after this evaluation.

        Returns:
            float32 [B, N, C].
        """
        span = after.times - before.times
        fresh = (span != 0).unsqueeze(-1)
        on_newer, on_older = self._weights(span, before, older)
        missing = torch.addcmul(self.missing, after.tokens - before.tokens, on_newer.unsqueeze(-1))
        if older is not None:
            missing.addcmul_(before.tokens - older.tokens, on_older.unsqueeze(-1))
        missing = torch.where(fresh, missing, 0.0)
        self.missing = torch.where(fresh, missing, self.missing)
        self.lag = self.lag.masked_fill(span != 0, 0.0)
        self.lag_squared = self.lag_squared.masked_fill(span != 0, 0.0)
        return missing

    def _weights(
        self, span: Tensor, before: ComputedOutput, older: ComputedOutput | None
    ) -> tuple[Tensor, Tensor]:
        """[B, N] of the change over `span` and of the one before it, in what is missing.

        The parabola through three outputs, Newton's form, summed over the steps in between: the
        line's share is `lag` times the slope, the bend's is known by `lag_squared`.
        """
        line = torch.where(span != 0, self.lag / nonzero(span), 0.0)
        if older is None:
            return line, line
        earlier = before.times - older.times
        known = (earlier != 0) & (span != 0)
        bend = (self.lag_squared - span * self.lag) / nonzero(span + earlier)
        bend = torch.where(known, bend, 0.0)
        return line + bend / nonzero(span), -bend / nonzero(earlier)

    def hand_out(self, newest: ComputedOutput, handed: Tensor, time: Clock) -> None:
        """Remember that `handed` [B, N, C] goes to the sampler at `time`."""
        self.withheld = newest.tokens.float() - handed
        self.behind = time - newest.times


def on_top(missing: Tensor, kept: Scalar, moved: Scalar) -> Tensor:
    """What to add to a prediction so that x' = kept x + moved p gains kept times `missing`."""
    if not isinstance(moved, Tensor):
        return missing * (kept / moved if moved else 0.0)
    weight = torch.where(moved == 0, 0.0, kept / torch.where(moved == 0, 1.0, moved))
    return missing * _over_channels(weight)


def _over_channels(moved: Scalar) -> Scalar:
    """To multiply [B, N, C] by: a number, or one of each row, [B, 1]."""
    return moved.unsqueeze(-1) if isinstance(moved, Tensor) and moved.dim() else moved
