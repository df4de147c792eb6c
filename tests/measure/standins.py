"""Methods that draw at once, in place of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdiff.measure.comparison import Method
from specdiff.models.subject import Request

SIDE = 32
REQUESTS = [Request("a red apple", 0), Request("a black cat that sits among many [brackets]", 1)]


@dataclass
class FakeRuntime:
    """Counts as the runtime would: half of 16 tokens at each of four steps."""

    tokens_computed: int = 0
    tokens_total: int = 0
    cache_bytes: int = 3 * 2**20
    compile_seconds: Mapping[str, float] = field(default_factory=lambda: {"dense": 1.5})
    fallbacks: Mapping[str, int] = field(default_factory=lambda: {"a NaN": 2})
    token_counts: Tensor | None = None

    def run(self) -> None:
        self.tokens_computed += 32
        self.tokens_total += 64
        self.token_counts = torch.arange(16).view(1, 16) % 5


def noise_picture(request: Request) -> Tensor:
    generator = torch.Generator().manual_seed(request.seed)
    return torch.rand(SIDE, SIDE, 3, generator=generator)


def selective(name: str, error: float, options: Mapping[str, object]) -> Method:
    runtime = FakeRuntime()

    def generate(request: Request) -> Tensor:
        runtime.run()
        return (noise_picture(request) + error).clamp(0, 1)

    return Method(name, 4, generate, lambda: runtime, options)


def stand_ins() -> list[Method]:
    return [
        Method("dense", 4, noise_picture),
        selective("specdiff", 0.01, {"cache_ratio": 0.5}),
        selective("paper", 0.1, {"cache_ratio": 0.5, "method": "paper"}),
        Method("dense, 2 steps", 2, noise_picture, compiles=False),
    ]
