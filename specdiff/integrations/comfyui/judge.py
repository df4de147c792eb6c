"""Judge: how far answers are forecast, by what forecasts missed of the guided answer.

As `specdiff.runtime.step.judge`, where guidance is known: the sampler gets a mix of the answers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from specdiff.integrations.comfyui.lane import Moment
from specdiff.runtime.sampler.displacement import wide
from specdiff.runtime.sampler.guides import RIDGE, share
from specdiff.runtime.sampler.remains import weights_of
from specdiff.runtime.tokens.trust import Trust


class Judge:
    """Of one run.

    Args:
        trusted: share of what moves a latent that a forecast may miss; 0: plans are followed.
    """

    def __init__(self, trusted: float) -> None:
        self._trusted = trusted
        self._trusts: defaultdict[Hashable, Trust] = defaultdict(Trust)
        self._computed: dict[Hashable, float] = {}
        """When answers of a kind were last computed."""

    def is_trusted(self, now: Moment) -> bool:
        """Whether a forecast may go as far as to here."""
        reach = self._trusts[now.kind].reach(now.index, 1, self._trusted)
        return not self._trusted or self._span(now) <= reach

    def forgoes_plan(self, now: Moment) -> bool:
        """Whether what forecasts miss, not the plan, tells where to compute."""
        known = now.kind in self._computed
        return known and self._trusts[now.kind].forgoes_plan(self._trusted)

    def note(
        self, x: Tensor, now: Moment, guided: Tensor, parts: Sequence[Tensor], missed: list[Tensor]
    ) -> None:
        """Learn from answers that were computed for x [B, ...].

        Args:
            x: the latent.
            now: when.
            guided: what became of the answers, as x.
            parts: the answers, as x.
            missed: what a forecast would have missed of the direction of each, [B, n].
        """
        if self._trusted and len(missed) == len(parts) and now.kind in self._computed:
            part = _share_missed(x, now.sigma, guided, parts, missed)
            self._trusts[now.kind].note(now.index, self._span(now), part)
        self._computed[now.kind] = now.clock

    def _span(self, now: Moment) -> float:
        return abs(now.clock - self._computed.get(now.kind, now.clock))


def _share_missed(
    x: Tensor, sigma: float, guided: Tensor, parts: Sequence[Tensor], missed: Sequence[Tensor]
) -> Tensor:
    """Scalar: of the direction that the sampler follows, the share missed, of the worst row."""
    kind = wide(x.device)
    moved, *directions = (((x - each).to(kind) / sigma).flatten(1) for each in (guided, *parts))
    weights = weights_of(torch.stack(directions, dim=1), moved, max(RIDGE, torch.finfo(kind).eps))
    mixed = sum(weights[:, i, None] * each for i, each in enumerate(missed))
    return share(torch.as_tensor(mixed).unsqueeze(1), moved.unsqueeze(1)).max()
