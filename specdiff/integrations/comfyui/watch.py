"""Watch: how the sampler came to the latent of an evaluation, by what earlier ones saw and gave."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from specdiff.runtime.sampler.remains import DEPTH, UNEXPLAINED, Seen, remains


class Watch:
    """The steps of one run."""

    def __init__(self) -> None:
        self._seen: tuple[Seen, ...] = ()
        self._parts: tuple[Seen, ...] = ()

    def strays(self, x: Tensor) -> bool:
        """Whether the step to x led where nothing that was seen leads: noise was added."""
        if not self._seen:
            return False
        if x.shape != self._seen[0].latents[0].shape:
            return True
        return remains([x], self._seen, self._parts, len(x)).item() > UNEXPLAINED

    def leave(self, x: Tensor, sigma: float, answer: Tensor, parts: Sequence[Tensor]) -> None:
        """What the evaluation gave: the guided answer, and those it was made of."""
        ways = [(((x - each).float() / sigma),) for each in (answer, *parts)]
        guided, *others = (Seen(sigma, (x.clone(),), (way,)) for way in ways)
        self._seen = (guided, *self._seen)[:DEPTH]
        self._parts = (*others, *self._parts)[: 3 * DEPTH]
