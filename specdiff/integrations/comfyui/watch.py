"""Watch: how the sampler came to the latent of an evaluation, by what earlier ones saw and gave."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from specdiff.runtime.sampler.remains import DEPTH, UNEXPLAINED, Seen, remains

OPEN = 0.999
"""Of a mask, from which on nothing of the picture below is put back."""


class Watch:
    """The steps of one run.

    Args:
        mask: of the shape of the latent, 1 where it is painted anew; None: everywhere. Outside,
            each step puts the picture back, which nothing that was seen leads to.
    """

    def __init__(self, mask: Tensor | None = None) -> None:
        opened = mask >= OPEN if mask is not None else None
        everywhere = opened is None or not opened.flatten(1).any(1).all()
        self._open = None if everywhere else opened
        self._seen: tuple[Seen, ...] = ()
        self._parts: tuple[Seen, ...] = ()

    def strays(self, x: Tensor) -> bool:
        """Whether the step to x led where nothing that was seen leads: noise was added."""
        if not self._seen:
            return False
        if x.shape != self._seen[0].latents[0].shape:
            return True
        return remains([self.opened(x)], self._seen, self._parts, len(x)).item() > UNEXPLAINED

    def leave(self, x: Tensor, sigma: float, directions: Sequence[Tensor]) -> None:
        """What the evaluation gave: directions, opened; of the guided answer, then of its parts."""
        latent = self.opened(x.clone())
        guided, *others = (Seen(sigma, (latent,), ((way,),)) for way in directions)
        self._seen = (guided, *self._seen)[:DEPTH]
        self._parts = (*others, *self._parts)[: 3 * DEPTH]

    def opened(self, values: Tensor) -> Tensor:
        """What the sampler moves by itself; zeros elsewhere, which are taken not to move."""
        return values if self._open is None else values * self._open
