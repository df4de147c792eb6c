"""What a compiled graph is made of: the plain data that the passes hand to the runtime.

Shapes use these letters: B batch rows, N tokens of the prunable segment (image tokens), S tokens of
an attention's key (text and image together), K active tokens, C channels of the token-level output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

InputRole = Literal["parameter", "latent", "time", "condition"]


@dataclass(frozen=True)
class InputSpec:
    """One flat input of the traced graph, named by where it came from in the caller's frame."""

    index: int
    name: str
    role: InputRole


@dataclass(frozen=True)
class Segment:
    """A run of tokens that the compiler found: a sequence axis of an attention, taken apart."""

    name: str
    length: int
    prunable: bool


@dataclass(frozen=True)
class CacheSlot:
    """A tensor that selective steps update in place; batch and tokens are its first two axes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Size of the slot in bytes."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize

    def allocate(self) -> Tensor:
        """A zeroed tensor of this slot."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Signature:
    """Everything the runtime may know of a graph: inputs, segments, caches, token-level output."""

    inputs: tuple[InputSpec, ...]
    segments: tuple[Segment, ...]
    caches: tuple[CacheSlot, ...]
    tokens: CacheSlot
    """Shape [B, N, C] of the token-level output, where forecasts live."""
    latent: int
    """Index of the input that is denoised; same shape as the output numbered `velocity`."""
    time: int | None
    """Index of the time input, or None if none was found."""
    velocity: int
    """Index of the output that predicts noise or velocity for the latent."""

    @property
    def batch(self) -> int:
        """B."""
        return self.tokens.shape[0]

    @property
    def prunable_tokens(self) -> int:
        """N."""
        return self.tokens.shape[1]

    @property
    def total_tokens(self) -> int:
        """Tokens of all segments together, per batch row."""
        return sum(segment.length for segment in self.segments)

    @property
    def cache_bytes(self) -> int:
        """Bytes of one stream's caches."""
        return sum(slot.nbytes for slot in self.caches)

    def indices(self, role: InputRole) -> tuple[int, ...]:
        """Positions of the inputs with this role."""
        return tuple(spec.index for spec in self.inputs if spec.role == role)


@dataclass(frozen=True)
class Evaluation:
    """What one run of a program returns."""

    tokens: Tensor
    """Token-level output: [B, N, C], or [B, K, C] for the active rows of a selective run."""
    importance: Tensor
    """Attention received by each prunable token, float32 [B, N] (paper, section on his)."""


class Programs(Protocol):
    """The executable variants of one traced graph. `inputs` are always the graph's flat inputs."""

    @property
    def signature(self) -> Signature:
        """What the programs take and give."""

    @property
    def compile_seconds(self) -> Mapping[str, float]:
        """Seconds spent compiling each program built so far, by its name."""

    def probe(self, inputs: Sequence[object]) -> Evaluation:
        """Every token computed, no cache read or written."""

    def dense(self, inputs: Sequence[object], caches: Sequence[Tensor]) -> Evaluation:
        """Every token computed; the caches are overwritten in place."""

    def selective(
        self, inputs: Sequence[object], caches: Sequence[Tensor], active: Tensor
    ) -> Evaluation:
        """Only `active` (int64 [B, K], ascending) computed; their cache rows updated in place."""

    def tail(self, inputs: Sequence[object], tokens: Tensor) -> list[Tensor]:
        """The graph's outputs from the token-level output [B, N, C]."""
