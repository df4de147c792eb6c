"""Shortfall: what forecasts cost the latent, and what makes it good, by a run's known weights.

A forecast q in place of a prediction p leaves later latents short of what p would have made of
them. Once the next prediction is computed, those in between are known much better, by the parabola
through the last three that were computed. So each prediction is handed out with what brings the
next latent to where the better known ones lead; the sampler's own weights, whatever its order, say
how much that is. What was put on top counts in later latents too, and is made good in the same way.

`correction` does the same with two numbers inferred from one step, for samplers of first order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specdiff.runtime.sampler.displacement import TINY, norm_of
from specdiff.runtime.sampler.weights import Weights
from specdiff.runtime.tokens.clock import plus, ratio
from specdiff.runtime.tokens.history import ComputedOutput

LARGEST = 1.0
"""What is put on top of a prediction, at most, relative to it. The rest is left to later ones."""


class Forecast(NamedTuple):
    """A prediction that was handed out instead of a computed one."""

    clock: float
    handed: Tensor
    """[B, N, C]"""
    more: Tensor | None
    """What was on top of it."""


class Shortfall:
    """What the latents of one run are short of, by the prediction that was handed out for less.

    Predictions are [B, N, C], all of whose tokens are computed, or none.
    """

    def __init__(self) -> None:
        self._forecasts: defaultdict[Hashable, dict[int, Forecast]] = defaultdict(dict)
        """By kind and evaluation, those since the last computed prediction."""
        self._short: dict[int, Tensor] = {}
        """By evaluation, what was handed out less than is now known to be right, float32."""

    def forecast(
        self, kind: Hashable, index: int, clock: float, known: Tensor, weights: Weights | None
    ) -> Tensor:
        """What to hand out at evaluation `index`, for which `known` was forecast.

        Predictions of one kind are forecast from each other.
        """
        more = self._missing(index, known, weights)
        handed = known if more is None else (known.float() + more).to(known.dtype)
        self._forecasts[kind][index] = Forecast(clock, handed, more)
        return handed

    def computed(
        self,
        kind: Hashable,
        index: int,
        computed: Sequence[ComputedOutput],
        weights: Weights | None,
    ) -> Tensor:
        """What to hand out at evaluation `index`, at which `computed[0]` of its kind was computed.

        Args:
            kind: as of `forecast`.
            index: of the evaluation.
            computed: the last predictions of its kind that were, newest first.
            weights: of the run, if known.
        """
        for at, (clock, handed, _) in self._forecasts.pop(kind, {}).items():
            self._short[at] = between(computed, clock) - handed.float()
        known = computed[0].tokens
        more = self._missing(index, known, weights)
        if weights is None or more is None:
            return known
        self._short[index] = -more
        self._join(index, weights)
        return (known.float() + more).to(known.dtype)

    def break_off(self) -> None:
        """What was computed is no ground for forecasts any longer, nor to know earlier ones better.

        What was put on top of them still counts in later latents.
        """
        for forecasts in self._forecasts.values():
            self._short |= {
                at: -each.more for at, each in forecasts.items() if each.more is not None
            }
        self._forecasts.clear()

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        waiting = [each for forecasts in self._forecasts.values() for each in forecasts.values()]
        more = [each.more for each in waiting if each.more is not None]
        return [*(each.handed for each in waiting), *more, *self._short.values()]

    def _missing(self, index: int, known: Tensor, weights: Weights | None) -> Tensor | None:
        """What on top of `known` brings the next latent to where it should be; None: nothing.

        Forecasts since the last computed prediction are taken to be right, but for what was on top.
        """
        if weights is None or index >= weights.evaluations:
            return None
        due = weights.due(index)
        terms = [short * due[at] for at, short in self._short.items() if due[at]]
        for forecasts in self._forecasts.values():
            terms += [
                each.more * -due[at]
                for at, each in forecasts.items()
                if each.more is not None and due[at]
            ]
        if not terms or not due[index]:
            return None
        more = torch.stack(terms).sum(0) / due[index]
        share = LARGEST * norm_of(known.float()) / norm_of(more).clamp_min(TINY)
        return more * share.clamp_max(1)

    def _join(self, index: int, weights: Weights) -> None:
        """Those that all later latents count alike are kept as one."""
        joined: dict[int, Tensor] = {}
        for at, short in self._short.items():
            ratios = ((other, weights.ratio(index, at, other)) for other in joined)
            alike = next(((other, ratio) for other, ratio in ratios if ratio is not None), None)
            if alike is None:
                joined[at] = short
            else:
                other, ratio = alike
                joined[other] = torch.add(joined[other], short, alpha=ratio)
        self._short = joined


def between(computed: Sequence[ComputedOutput], clock: float) -> Tensor:
    """float32: the prediction before the newest computed one, by the parabola through three.

    In Newton's form; by the line where there are two.
    """
    newest, before, *older = computed
    span, behind = newest.times - before.times, clock - newest.times
    last = newest.tokens.float() - before.tokens
    value = plus(newest.tokens.float(), last, ratio(behind, span))
    if not older:
        return value
    earlier = before.times - older[0].times
    bend = ratio(behind * (clock - before.times), newest.times - older[0].times)
    bend = bend * (earlier != 0) * (span != 0)
    value = plus(value, last, ratio(bend, span))
    return plus(value, before.tokens.float() - older[0].tokens, -ratio(bend, earlier))
