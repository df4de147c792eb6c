"""Correction: what forecasts did to the latent is made good when a token is next computed.

A sampler's step x' = a x + b p, handed a forecast q instead of the prediction p, leaves the latent
short of b (p - q). Once the token is computed again, the predictions in between are known much
better, by the line from its last computed output to the new one; what is missing goes on top of the
new output, as much as the sampler's next step turns into just that. Costs no evaluation. The idea
is the corrector of predictor-corrector solvers (UniPC, Zhao et al. 2023, section 3.2), per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdiff.runtime.forecast import slope
from specdiff.runtime.history import ComputedOutput


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
    withheld: Tensor
    """float32 [B, N, C]: last computed output less what was handed out, at the last evaluation."""
    behind: Tensor
    """float32 [B, N]: time of the last evaluation less that of the last computed output."""

    @classmethod
    def none(cls, newest: ComputedOutput) -> Correction:
        """Of a trajectory whose first evaluation gave `newest`."""
        zeros = torch.zeros_like(newest.tokens, dtype=torch.float32)
        times = torch.zeros_like(newest.times)
        return cls(zeros, times, zeros, times)

    def settle(self, kept: Tensor, moved: Tensor) -> None:
        """The sampler has stepped: x' = kept x + moved p, scalars."""
        self.missing = kept * self.missing + moved * self.withheld
        self.lag = kept * self.lag + moved * self.behind

    def collect(self, before: ComputedOutput, after: ComputedOutput) -> Tensor:
        """What tokens that were just computed lack; zero for the others.

        Args:
            before: each token's last computed output before this evaluation.
            after: the same, after it.

        Returns:
            float32 [B, N, C].
        """
        fresh = after.times != before.times
        found = self.missing + slope(after, before) * self.lag.unsqueeze(-1)
        self.missing = torch.where(fresh.unsqueeze(-1), found, self.missing)
        self.lag = torch.where(fresh, 0.0, self.lag)
        return torch.where(fresh.unsqueeze(-1), found, 0.0)

    def hand_out(self, newest: ComputedOutput, handed: Tensor, time: float) -> None:
        """Remember that `handed` [B, N, C] goes to the sampler at `time`."""
        self.withheld = newest.tokens.float() - handed.float()
        self.behind = time - newest.times


def on_top(missing: Tensor, kept: Tensor, moved: Tensor) -> Tensor:
    """What to add to a prediction so that x' = kept x + moved p gains kept times `missing`."""
    weight = torch.where(moved == 0, 0.0, kept / torch.where(moved == 0, 1.0, moved))
    return missing * weight
