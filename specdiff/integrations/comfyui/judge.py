"""Judge: how far answers are forecast, by what forecasts missed of the guided answer.

As `specdiff.runtime.step.judge`, where guidance is known: the sampler gets a mix of the answers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdiff.runtime.sampler.displacement import wide
from specdiff.runtime.sampler.guides import RIDGE, share
from specdiff.runtime.sampler.remains import weights_of
from specdiff.runtime.tokens.trust import Trust


@dataclass
class Misses:
    """What forecasts would have missed of the answers to one evaluation; directions [B, ...]."""

    missed: list[Tensor] = field(default_factory=list)
    """The forecast of each less what was computed."""
    computed: list[Tensor] = field(default_factory=list)
    span: float = 0.0
    """Time since answers were computed before."""


class Judge:
    """Of one run.

    Args:
        trusted: share of what moves a latent that a forecast may miss; 0: plans are followed.
    """

    def __init__(self, trusted: float) -> None:
        self._trusted = trusted
        self._trusts: defaultdict[Hashable, Trust] = defaultdict(Trust)

    @property
    def judges(self) -> bool:
        """Whether anything but the plan counts."""
        return self._trusted > 0

    def reaches(self, kind: Hashable, index: int, span: float) -> bool:
        """Whether a forecast of a kind may go as far, at the evaluation of this number."""
        return not self.judges or span <= self._trusts[kind].reach(index, 1, self._trusted)

    def note(
        self, kind: Hashable, index: int, guided: Tensor, parts: Sequence[Tensor], misses: Misses
    ) -> None:
        """Learn from an evaluation.

        Args:
            kind: of answers.
            index: of the evaluation.
            guided: direction that the sampler got, [B, ...].
            parts: directions that it is mixed of.
            misses: of those, in their order; fewer where some were forecast or had no forecast.
        """
        if misses.missed and len(misses.missed) == len(parts):
            part = _share_missed(guided, parts, misses)
            self._trusts[kind].note(index, misses.span, part)


def _share_missed(guided: Tensor, parts: Sequence[Tensor], misses: Misses) -> Tensor:
    """Scalar: of the direction that was mixed, the share missed, of the worst row."""
    kind = wide(guided.device)
    span = torch.stack([part.flatten(1) for part in parts], dim=1).to(kind)
    ridge = max(RIDGE, torch.finfo(kind).eps)
    weights = weights_of(span, guided.flatten(1).to(kind), ridge).unsqueeze(1)
    mixed = [
        weights @ torch.stack([part.flatten(1) for part in each], dim=1).to(kind)
        for each in (misses.missed, misses.computed)
    ]
    return share(*mixed).max()
