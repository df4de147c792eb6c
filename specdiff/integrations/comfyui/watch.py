"""Watch: how the sampler came to the latent of an evaluation, by what earlier ones saw and gave."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdiff.runtime.sampler.remains import DEPTH, UNEXPLAINED, Seen, remains

FIRST_ORDER = 5e-3
"""What a step of Euler's may miss, relative to its length."""
CHANGED = 4 * FIRST_ORDER
"""Relative difference of two directions in a row, halved, that shows in a step that uses both."""
EULER = ("euler", "ddim")


class Watch:
    """The steps of one run.

    Args:
        sampler: its name; Euler's steps are known before they are seen.
        mask: [B, ...], 1 where the picture is made, 0 where it is given; None: made everywhere.
    """

    def __init__(self, sampler: str, mask: Tensor | None) -> None:
        self.strays = False
        """Whether the latest step led where nothing that was seen leads: noise was added."""
        self._mask = mask
        self._first_order, self._proven = True, sampler in EULER
        self._seen: tuple[Seen, ...] = ()
        self._parts: tuple[Seen, ...] = ()
        self._moved: float | None = None

    @property
    def moved(self) -> float | None:
        """How far sigma went in the latest step, if that was Euler's as all before it."""
        return self._moved if self.is_euler else None

    @property
    def is_euler(self) -> bool:
        """Whether every step is one of Euler's, as far as it was seen."""
        return self._first_order and self._proven

    def arrive(self, x: Tensor, sigma: float) -> None:
        """The latent of the next evaluation."""
        if not self._seen:
            return
        before = self._seen[0]
        self._moved = sigma - before.time
        if x.shape != before.latents[0].shape:
            self.strays = True
            return
        self.strays = remains([x], self._seen, self._parts, len(x)).item() > UNEXPLAINED
        if self._first_order:
            self._check_order(x, before, self._moved)

    def leave(self, x: Tensor, sigma: float, answer: Tensor, parts: Sequence[Tensor]) -> None:
        """What the evaluation gave: the guided answer, and those it was made of."""
        ways = tuple(((x - each).float() / sigma,) for each in (answer, *parts))
        guided, *others = (Seen(sigma, (x.clone(),), (way,)) for way in ways)
        self._seen = (guided, *self._seen)[:DEPTH]
        self._parts = (*others, *self._parts)[: 3 * DEPTH]

    def _check_order(self, x: Tensor, before: Seen, moved: float) -> None:
        """Whether the step follows from the last direction alone."""
        direction, step = before.predictions[0][0], self._made(x - before.latents[0])
        missed = step - moved * self._made(direction)
        rounding = torch.finfo(x.dtype).eps * x.float().norm()
        allowed = FIRST_ORDER * step.norm() + rounding
        if missed.norm() > allowed:
            self._first_order = False
        elif len(self._seen) > 1 and self._seen[1].latents[0].shape == x.shape:
            change = self._made(direction - self._seen[1].predictions[0][0])
            self._proven |= bool(change.norm() > CHANGED * self._made(direction).norm())

    def _made(self, values: Tensor) -> Tensor:
        """Those where the picture is made, float32; others 0."""
        if self._mask is None:
            return values.float()
        return values.float() * (self._mask.to(values.device) == 1)
