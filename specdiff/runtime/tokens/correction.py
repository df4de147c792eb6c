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

from specdiff.runtime.sampler.displacement import as_float32
from specdiff.runtime.tokens.clock import Clock, chosen, of_values, plus, ratio, scaled
from specdiff.runtime.tokens.history import ComputedOutput


@dataclass
class Correction:
    """What one trajectory's latent is short of, as of its latest evaluation.

    `missing` is exact for a token just computed, and for the others grows by `settle`, under the
    assumption that their output stood still; `lag` times the slope of the output is to be added.
    """

    missing: Tensor
    """float32 [B, N, C]"""
    lag: Clock
    """In time."""
    lag_squared: Clock
    """In time squared: the same of the distance to the last computed output, squared, for how the
    output bends."""
    withheld: Tensor
    """float32 [B, N, C]: last computed output less what was handed out, at the last evaluation."""
    behind: Clock
    """Time of the last evaluation less that of the last computed output."""

    @classmethod
    def none(cls, newest: ComputedOutput) -> Correction:
        """Of a trajectory whose first evaluation gave `newest`."""
        zeros = torch.zeros_like(newest.tokens, dtype=torch.float32)
        return cls(zeros, 0.0, 0.0, zeros, 0.0)

    def settle(self, kept: Clock, moved: Clock) -> None:
        """The sampler has stepped: x' = kept x + moved p, each row as far as it was, [B, 1]."""
        self.missing = plus(scaled(self.missing, kept), self.withheld, moved)
        self.lag = self.lag * kept + self.behind * moved
        self.lag_squared = self.lag_squared * kept + self.behind * self.behind * moved

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
        fresh = span != 0
        on_newer, on_older = self._weights(span, before, older)
        missing = plus(self.missing, after.tokens - before.tokens, on_newer)
        if older is not None:
            missing = plus(missing, before.tokens - older.tokens, on_older)
        whole = of_values(fresh)
        found: Tensor = chosen(whole, missing, torch.zeros_like(missing))
        self.missing = chosen(whole, missing, self.missing)
        self.lag = chosen(fresh, 0.0, self.lag)
        self.lag_squared = chosen(fresh, 0.0, self.lag_squared)
        return found

    def _weights(
        self, span: Clock, before: ComputedOutput, older: ComputedOutput | None
    ) -> tuple[Clock, Clock]:
        """Of the change over `span` and of the one before it, in what is missing.

        The parabola through three outputs, Newton's form, summed over the steps in between: the
        line's share is `lag` times the slope, the bend's is known by `lag_squared`.
        """
        line = ratio(self.lag, span)
        if older is None:
            return line, line
        earlier = before.times - older.times
        bend = ratio(self.lag_squared - span * self.lag, span + earlier) * (earlier != 0)
        return line + ratio(bend, span), -ratio(bend, earlier)

    def hand_out(self, newest: ComputedOutput, handed: Tensor, time: Clock) -> None:
        """Remember that `handed` [B, N, C] goes to the sampler at `time`."""
        self.withheld = as_float32(newest.tokens) - handed
        self.behind = time - newest.times


def on_top(missing: Tensor, kept: Clock, moved: Clock) -> Tensor:
    """What to add to a prediction so that x' = kept x + moved p gains kept times `missing`."""
    return missing * of_values(ratio(kept, moved))
