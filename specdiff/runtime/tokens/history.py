"""What a stream remembers of its tokens: merged outputs by step, computed outputs by token."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from specdiff.runtime.tokens.clock import Clock, beyond, ratio

DEPTH = 3
LED = 0.5
"""Of the way from what was computed elsewhere to the first output here, the most that its line may
miss. The same function of the rows misses little; an adapter switched on is missed by all of it."""


class StepOutput(NamedTuple):
    """The merged output of one evaluation."""

    time: Clock
    """One, or that of each row, [B, 1]."""
    tokens: Tensor
    """[B, N, C]"""


class ComputedOutput(NamedTuple):
    """For each token, one of the last outputs that the network computed for it."""

    times: Clock
    """When: one time, that of each row, [B, 1], or of each token, [B, N]."""
    tokens: Tensor
    """[B, N, C]"""


class History:
    """Outputs of the current generation, newest first, at most `DEPTH` of each kind.

    No tensor is changed after it was stored: every record makes new ones. While all tokens are
    computed together, what is counted of them is counted on the host.
    """

    def __init__(self, batch: int, tokens: int, device: torch.device) -> None:
        self.evaluations = 0
        self.steps: tuple[StepOutput, ...] = ()
        self.computed: tuple[ComputedOutput, ...] = ()
        self._shape, self._device = (batch, tokens), device
        self._counts: int | Tensor = 0
        self._age: int | Tensor = 0
        self._inherited: tuple[tuple[ComputedOutput, ...], ...] = ()
        """What may have been computed of these rows elsewhere; the first outputs tell which."""
        self._apart = False
        """Whether some tokens were computed without the others."""
        self._wanted = 1
        """How many outputs forecasts start from at least."""
        self.made_room = False
        """Whether outputs that were kept are no more."""

    @property
    def batch(self) -> int:
        """B."""
        return self._shape[0]

    @property
    def leads_on(self) -> bool:
        """Whether forecasts can start from what was computed."""
        return len(self.computed) >= self._wanted

    def record_dense(self, time: Clock, tokens: Tensor) -> None:
        """Every token was computed: `tokens` [B, N, C], owned by the history from now on."""
        newest = ComputedOutput(self._of_each(time) if self._apart else time, tokens)
        self.computed = (newest, *self._led_here(time, tokens))[:DEPTH]
        self._inherited = ()
        if self.leads_on:
            self._wanted, self.made_room = 1, False
        self._counts, self._age = self._counts + 1, self._age * 0
        self._record_step(time, tokens)

    def record_selective(self, time: Clock, merged: Tensor, active: Tensor) -> None:
        """`merged` [B, N, C] holds new outputs at `active` (int64 [B, K]), forecasts elsewhere."""
        self._take_apart()
        fresh = torch.zeros_like(self.counts, dtype=torch.bool).scatter(1, active, True)
        newest = ComputedOutput(self._of_each(time), merged)
        # A token that stays behind keeps its entries; where the record is shorter than DEPTH its
        # oldest entry is repeated, which forecasters see as two equal times.
        kept = (*self.computed, self.computed[-1])[:DEPTH]
        shifted = (newest, *kept)
        self.computed = tuple(
            ComputedOutput(
                torch.where(fresh, new.times, old.times),
                torch.where(fresh.unsqueeze(-1), new.tokens, old.tokens),
            )
            for new, old in zip(shifted, kept, strict=False)
        )
        self._counts = self.counts + fresh
        self._age = (self.age + 1).masked_fill(fresh, 0)
        self._record_step(time, merged)

    def record_skipped(self, time: Clock, forecast: Tensor) -> None:
        """No token was computed: `forecast` [B, N, C] was handed out."""
        self._age = self._age + 1
        self._record_step(time, forecast)

    def break_off(self) -> None:
        """Forget what was computed: it leads nowhere from here."""
        self.computed = self._inherited = ()

    def make_room(self) -> None:
        """Keep no outputs; forecasts begin once there are two again, as one has no line."""
        self.break_off()
        self.steps = ()
        self._wanted, self.made_room = 2, True

    def inherit(self, other: History) -> None:
        """Go on from what was computed elsewhere of as many rows, or of twice as many: guidance.

        It is of use from the first outputs on, if it leads there: else two of them are needed, as
        a line to them from those of another function goes nowhere. What is not of one time is left
        behind.
        """
        (rows, _), (before, _) = self._shape, other._shape
        self._wanted, whole = 2, other.computed
        if any(isinstance(output.times, Tensor) for output in whole) or not whole:
            return
        if before == rows:
            self._inherited = (whole,)
        elif before == 2 * rows:
            halves = [[output.tokens.chunk(2)[half] for output in whole] for half in (0, 1)]
            self._inherited = tuple(
                tuple(
                    ComputedOutput(output.times, half)
                    for output, half in zip(whole, of_half, strict=True)
                )
                for of_half in halves
            )

    @property
    def counts(self) -> Tensor:
        """int32 [B, N]: how often each token was computed."""
        return self.counted()

    @property
    def counted(self) -> Callable[[], Tensor]:
        """Gives `counts` as they are now."""
        return cache(partial(_of_all, self._counts, self._shape, self._device, torch.int32))

    @property
    def age(self) -> Tensor:
        """int32 [B, N]: evaluations since each token was last computed."""
        return _of_all(self._age, self._shape, self._device, torch.int32)

    @property
    def cached(self) -> Tensor:
        """int32 [B, N]: how often each token was served from cache (the paper's cf)."""
        return self.evaluations - self.counts

    def _led_here(self, time: Clock, tokens: Tensor) -> tuple[ComputedOutput, ...]:
        """What was computed before that leads to new outputs. Reads the device if inherited."""
        if not self._inherited:
            return self.computed
        before = _nearest(tokens, self._inherited)
        led = _is_on_line(time, tokens, before)
        self._wanted = 1 if led else 2
        return before if led else ()

    def _take_apart(self) -> None:
        """Know each token by itself from here on."""
        if not self._apart:
            self._apart = True
            self.computed = tuple(
                ComputedOutput(self._of_each(times), tokens) for times, tokens in self.computed
            )

    def _of_each(self, time: Clock) -> Tensor:
        """float32 [B, N]: a time, of each token."""
        return _of_all(time, self._shape, self._device, torch.float32)

    def _record_step(self, time: Clock, tokens: Tensor) -> None:
        self.steps = (StepOutput(time, tokens), *self.steps)[:DEPTH]
        self.evaluations += 1


def _nearest(
    tokens: Tensor, ways: tuple[tuple[ComputedOutput, ...], ...]
) -> tuple[ComputedOutput, ...]:
    """Of earlier outputs, those whose newest are nearest to `tokens`, decided on the device."""
    fitting = [way for way in ways if way[0].tokens.shape == tokens.shape]
    if len(fitting) < 2:
        return fitting[0] if fitting else ()
    one, other = fitting
    distances = [torch.dist(tokens.float(), way[0].tokens.float()) for way in fitting]
    first = distances[0] <= distances[1]
    return tuple(
        ComputedOutput(a.times, torch.where(first, a.tokens, b.tokens))
        for a, b in zip(one, other, strict=True)
    )


def _is_on_line(time: Clock, tokens: Tensor, before: tuple[ComputedOutput, ...]) -> bool:
    """Whether the line through earlier outputs leads near new ones."""
    if len(before) < 2:
        return False
    newer, older = before[:2]
    share = ratio(time - newer.times, newer.times - older.times)
    missed = torch.dist(tokens, beyond(newer.tokens, older.tokens, share))
    return bool(missed <= LED * torch.dist(tokens, newer.tokens))


def _of_all(
    value: Clock, shape: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """[B, N]: a value, of each token."""
    if isinstance(value, Tensor):
        return value.expand(shape)
    return torch.full(shape, value, dtype=dtype, device=device)
