"""Solution: what to hand a sampler so that its steps end where the sampling equation leads.

A sampler of first order moves the latent by h p in one step, where h is the length of the step in
the clock in which it is linear. Handed the prediction p = f(c) at the step's beginning, it follows
the tangent. It ends on the solution if p is the mean of f over the step instead:

    predict   f goes on along the line through its last two computed values
    correct   at the next computed value the line is replaced by the parabola through three, or the
              trapezium of two; what the latent lacks is put into the next step

No evaluation is added (Adams-Bashforth and Adams-Moulton, in the mode PEC). How far line and
parabola are trusted is seen from the values themselves: which share of the line would have told the
newest one best. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NODES = 3
"""Computed values that are looked back to."""
TINY = torch.finfo(torch.float32).tiny


class Node(NamedTuple):
    """A value that was computed."""

    clock: float
    value: Tensor
    """float [B, ...]"""


@dataclass
class Solution:
    """How far the latent of one trajectory is from the solution; rows [B] are apart.

    But for the trust in the line, where rows guide each other: what moves the latent decides.
    """

    guidance: Callable[[Tensor], Tensor] = lambda value: value
    """From values [B, ...] what moves the latents of these rows."""
    nodes: tuple[Node, ...] = ()
    """Newest first, at most `NODES`."""
    short: Tensor | float = 0.0
    """Solution less latent at the latest evaluation, float32 [B, ...], in clock times prediction.
    In between computed values the line counts as the solution."""
    share: Tensor | float = 0.0
    """How far the line is followed, float32 [B, 1, ...], from 0 to 1."""
    _handed: Node | None = None
    """What the sampler was handed last, and when."""

    def arrive(self, clock: float, value: Tensor | None) -> None:
        """The sampler has come to `clock`, where `value` was computed, or None."""
        if self._handed is not None:
            step = clock - self._handed.clock
            self.short = self.short - step * self._handed.value.float()
        if value is not None:
            self._watch(clock, value)
            self.nodes = (Node(clock, value), *self.nodes)[:NODES]
            if len(self.nodes) > 1:
                self.short = self.short + self._passed()

    def answer(self, clock: float, due: float) -> Tensor:
        """What to hand over for the step from `clock` to `due`, float32 [B, ...].

        After a computed value it also makes good what the latent lacks.
        """
        newest = self.nodes[0]
        mean = newest.value.float()
        if len(self.nodes) > 1:
            ahead = (clock + due) / 2 - newest.clock
            mean = mean + (self.share * ahead) * _slope(*self.nodes[:2])
        return mean + self.short / (due - clock) if newest.clock == clock else mean

    def hand(self, clock: float, handed: Tensor) -> None:
        """Remember what the sampler gets at `clock`."""
        self._handed = Node(clock, handed)

    def _passed(self) -> Tensor:
        """The integral from the last but one computed value to the last."""
        newest, before, *older = self.nodes
        step = newest.clock - before.clock
        found = (newest.value.float() + before.value.float()) * (step / 2)
        if older:
            bend = (_slope(newest, before) - _slope(before, older[0])) / (
                newest.clock - older[0].clock
            )
            found = found - (self.share * (step**3 / 6)) * bend
        return found

    def _watch(self, clock: float, value: Tensor) -> None:
        """See which share of the line would have told this value best: least squares."""
        if len(self.nodes) < 2:
            return
        newest, before = self.nodes[:2]
        told = _slope(newest, before) * (clock - newest.clock)
        came, told = (
            self.guidance(each).flatten(1) for each in (value.float() - newest.value.float(), told)
        )
        share = (came * told).sum(1) / told.square().sum(1).clamp_min(TINY)
        self.share = share.clamp(0, 1).reshape(-1, *[1] * (value.dim() - 1))


def _slope(newer: Node, older: Node) -> Tensor:
    return (newer.value.float() - older.value.float()) / (newer.clock - older.clock)
