"""Scale: of guidance whose halves share a batch, where nobody told it: the sampler's step does.

Both halves are predictions of the same latents, which the sampler moves by u + g (c - u).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from specdiff.runtime.sampler.displacement import TINY, guided, wide
from specdiff.runtime.sampler.guides import RIDGE
from specdiff.runtime.sampler.remains import (
    EXPLAINED,
    ROUNDED,
    Awaited,
    Seen,
    precision_of,
    rows_of,
    weights_of,
)

TRIES = 8
"""Steps that are looked at: rounding may hide the scale in the first, which are short."""
UNSURE = 0.01
"""Relative error of the scale from which on it is not believed; two steps in a row have to agree
within twice as much, or the scale is one that changes."""


class LearnedScale:
    """What a trajectory's steps tell of the scale."""

    def __init__(self) -> None:
        self.value: float | None = None
        """g, with the first half as the unconditional one; None: not known."""
        self._tries = TRIES
        self._shown: float | None = None
        """By the step before."""
        self._sent: deque[Awaited] = deque()

    @property
    def looks(self) -> bool:
        """Whether it may become known."""
        return self.value is None and (self._tries > 0 or bool(self._sent))

    def look(self, latents: Sequence[Tensor], before: Seen, batch: int, lag: int) -> bool:
        """Whether the scale has become known.

        Args:
            latents: of the present evaluation.
            before: the evaluation before it.
            batch: rows of each, an even number.
            lag: evaluations from one to the reading of what it showed.
        """
        if self.value is not None or len(before.predictions) != 1:
            return False
        if lag and len(self._sent) >= (lag if self._tries else 1):
            self._read(*self._sent.popleft().read())
        if self._tries and self.value is None:
            self._tries -= 1
            self._sent.append(Awaited(scale_shown(latents, before, batch)))
            if not lag:
                self._read(*self._sent.popleft().read())
        return self.value is not None

    def _read(self, pairs: float, scale: float, unsure: float) -> None:
        """Know what a step has shown."""
        shown, self._shown = self._shown, None
        if not pairs:
            self._tries = 0
            self._sent.clear()
        elif unsure < UNSURE:
            self._shown = scale
            if shown is not None and abs(scale - shown) < 2 * UNSURE * abs(scale):
                self.value = scale


def scale_shown(latents: Sequence[Tensor], before: Seen, batch: int) -> Tensor:
    """[3]: whether the halves are of the same latents, the scale, and its relative error.

    The error is infinite where a step is not made of both halves by one scale.

    Args:
        latents: of an evaluation.
        before: the evaluation before it.
        batch: B, rows of both, an even number.
    """
    device = latents[0].device
    parts = (latents, before.latents, before.predictions[0])
    rows = [rows_of(part, batch) for part in parts]
    if any(len(each) != batch for each in rows):
        return torch.zeros(3, device=device)
    now, then, predicted = (each.to(wide(device)).unflatten(0, (2, -1)) for each in rows)
    same = (now[0] == now[1]).all() & (then[0] == then[1]).all()
    step, (first, second) = now[0] - then[0], predicted
    span = torch.stack([then[0], first, second - first], dim=1) * (step != 0).unsqueeze(1)
    weights = weights_of(span, step, max(RIDGE, torch.finfo(step.dtype).eps))
    left = step - (weights.unsqueeze(1) @ span).squeeze(1)
    _, moved, apart = weights.unbind(1)
    scales = apart / moved
    scale = scales.mean()
    length, numbers = step.norm(dim=1), step.shape[1]
    rounding = ROUNDED * precision_of(latents) * then[0].norm(dim=1)
    explained = ((left.norm(dim=1) - rounding) < EXPLAINED * length).all()
    # what is left hides so much of the part that is due to the scale, and rows may differ by it
    hidden = left.norm(dim=1) / (apart * span[:, 2].norm(dim=1)).abs().clamp_min(TINY)
    spread = (scales - scale).abs().max() / scale.abs().clamp_min(TINY)
    unsure = torch.maximum(hidden.max() / numbers**0.5, spread)
    unsure = torch.where(explained & unsure.isfinite(), unsure, torch.inf)
    return torch.stack([same.to(scale), scale, unsure])


def read_as_called(seen: Seen, scale: float) -> Seen:
    """The reverse of `read_as_guided`: its predictions as the model gave them."""
    if len(seen.predictions) != 2 or abs(2 * scale - 1) < UNSURE:
        return seen
    found = []
    for one, other in zip(*seen.predictions, strict=True):
        mean, apart = (one + other) / 2, (one - other) / (1 - 2 * scale) / 2
        rows = len(one) // 2
        found.append(torch.cat([(mean + apart)[:rows], (mean - apart)[:rows]]))
    return Seen(seen.time, seen.latents, (tuple(found),))


def read_as_guided(seen: Seen, scale: float) -> Seen:
    """The same evaluation, its predictions read as both halves of guidance of this scale."""
    if len(seen.predictions) != 1:
        return seen
    ways = zip(*(guided(each, scale) for each in seen.predictions[0]), strict=True)
    return Seen(seen.time, seen.latents, tuple(ways))
