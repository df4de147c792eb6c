"""Dense runs looked into: attention received and output of every token at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from specdiff.models.subject import STEPS, Request, Subject


class AttentionReceived(TorchFunctionMode):
    """Sums the softmax probabilities each key receives, over layers, heads and queries `[B, L]`."""

    def __init__(self) -> None:
        super().__init__()
        self.total: Tensor | None = None

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key"), args[:2], strict=False)) | (kwargs or {})
            query, key = named["query"], named["key"]
            scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
            received = scores.softmax(-1).sum((1, 2))
            self.total = received if self.total is None else self.total + received
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Record:
    """One dense run of T steps over N image tokens; of guided pairs, the conditional half.

    Attributes:
        times: When each step was, 1 (noise) to 0, `[T]`.
        importance: Attention received `[T, N]`.
        outputs: The model's output `[T, N, D]`.
    """

    times: Tensor
    importance: Tensor
    outputs: Tensor


def as_tokens(output: Tensor, patch: int = 4) -> Tensor:
    """Outputs as tokens `[B, N, D]`; pictures `[B, C, H, W]` are cut into patches."""
    if output.dim() == 3:
        return output
    return functional.unfold(output, patch, stride=patch).transpose(1, 2)


def record(subject: Subject, request: Request, steps: int = STEPS) -> Record:
    """Run the untouched model for so many steps and write down what it does."""
    pipeline = subject.load()
    seen: list[tuple[float, Tensor, Tensor]] = []
    forward = pipeline.transformer.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        with AttentionReceived() as attention:
            result = forward(*args, **kwargs)
        tokens = as_tokens(result[0])[-1].float()
        assert attention.total is not None
        received = attention.total[-1]
        count = len(tokens)
        # SD3 puts the image first, FLUX the text
        image = received[:count] if subject.name == "textures" else received[-count:]
        time = float(kwargs["timestep"].flatten()[0])
        seen.append((time / 1000 if time > 1 else time, image, tokens))
        return result

    pipeline.transformer.forward = watched
    subject.draw(pipeline, request, steps)
    times, importance, outputs = zip(*seen, strict=True)
    return Record(torch.tensor(times), torch.stack(importance), torch.stack(outputs))
