"""The programs of a model of which nothing but the boundary is known: all of a step, or none of it.

    computed step    the model as it is                       its prediction, as one token a sample
    skipped step     that token forecast, cut up again        no program runs

Caches, importance and selected tokens there are none. What the model returns beside its prediction
is on skipped steps what it last returned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from specdiff.program import Evaluation, Signature

Model = Callable[[Sequence[object]], Sequence[Any]]
"""Takes a model's flat inputs and returns its flat outputs."""


class StepPrograms:
    """Implements `specdiff.program.Programs` by the model itself.

    Args:
        model: what computes a step.
        signature: made by `specdiff.boundary.step_signature` from a call of it.
    """

    def __init__(self, model: Model, signature: Signature) -> None:
        self.signature = signature
        self._model = model
        self._latest: list[Any] = []
        """The flat outputs of the last computed step; None where a prediction was."""
        self._shapes: list[tuple[torch.Size, torch.dtype]] = []

    @property
    def compile_seconds(self) -> Mapping[str, float]:
        """Nothing is compiled here."""
        return {}

    def probe(self, inputs: Sequence[object]) -> Tensor:
        """The prediction, [B, 1, n]."""
        outputs = self._model(inputs)
        predictions = [outputs[pair.velocity] for pair in self.signature.denoised]
        self._shapes = [(each.shape, each.dtype) for each in predictions]
        self._latest = list(outputs)
        for pair in self.signature.denoised:
            self._latest[pair.velocity] = None
        slot, apart = self.signature.tokens, self.signature.samples_apart
        rows = 1 if apart else slot.shape[0]
        parts = [each.reshape(rows, 1, -1).to(slot.dtype) for each in predictions]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=0 if apart else 2)

    def dense(self, inputs: Sequence[object], caches: Sequence[Tensor]) -> Evaluation:
        """The prediction; there are no caches to write."""
        return Evaluation(self.probe(inputs))

    def tabulate(
        self, inputs: Sequence[object], caches: Sequence[Tensor], later: Sequence[Tensor] = ()
    ) -> None:
        """Nothing to fill."""

    def selective(
        self,
        inputs: Sequence[object],
        caches: Sequence[Tensor],
        active: Tensor,
        text: bool = True,
        importance: bool = True,
        row: int | None = None,
    ) -> Evaluation:
        """Never asked for: the signature says why no tokens can be selected."""
        raise NotImplementedError(self.signature.unselectable)

    def tail(self, inputs: Sequence[object], tokens: Tensor) -> list[Any]:
        """The model's flat outputs with the prediction [B, 1, n]."""
        outputs = list(self._latest)
        pairs = zip(self.signature.denoised, self._cut(tokens), self._shapes, strict=True)
        for pair, part, (shape, dtype) in pairs:
            own = part if part.dtype is dtype else part.to(dtype)
            outputs[pair.velocity] = own.reshape(shape)
        return outputs

    def _cut(self, tokens: Tensor) -> Sequence[Tensor]:
        """The predictions, each [1, 1, n] or [B, 1, n]."""
        if len(self._shapes) == 1:
            return (tokens,)
        apart, sizes = self.signature.samples_apart, [shape.numel() for shape, _ in self._shapes]
        parts: Sequence[Tensor]
        parts = tokens.split(1) if apart else tokens.split([n // len(tokens) for n in sizes], dim=2)
        return parts
