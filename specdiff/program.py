"""What a compiled graph is made of: the plain data that the passes hand to the runtime.

Letters in shapes: B batch rows; N tokens of the prunable segments (image tokens); K active tokens;
S tokens of an attention's key (text and image together); C channels of the token-level output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

InputRole = Literal["parameter", "latent", "time", "condition", "scalar"]
"""A scalar is a float input with at most one number per sample, such as a guidance scale. Pipelines
may make it anew for each step, so its identity does not tell two generations apart."""


NAME_TOKENS = 'name the argument of the blocks that holds the picture, attach(model, tokens="...")'
"""The remedy where a block's text and picture have as many tokens."""


TIMES_AT_ONCE = 16
"""Rows of a table by timestep. Filling this many takes hardly longer than filling one."""


TIME_NAMES = ("timestep", "timesteps", "t", "time", "times", "sigma", "sigmas")
"""What a time input is called, the surest first; and how its name may end: `video_timesteps`."""


def time_rank(name: str, timestep_arg: str | None) -> int | None:
    """How sure it is that an input of this name is the time, 0 the surest; None if it is not.

    The option `timestep_arg` alone decides where it is given.
    """
    if timestep_arg is not None:
        return 0 if name == timestep_arg else None
    if name in TIME_NAMES:
        return TIME_NAMES.index(name)
    last = name.rpartition("_")[2]
    return len(TIME_NAMES) if len(last) > 1 and last in TIME_NAMES else None


@dataclass(frozen=True)
class InputSpec:
    """One flat input of the traced graph, named by where it came from in the caller's frame."""

    index: int
    name: str
    role: InputRole


@dataclass(frozen=True)
class Denoised:
    """An input and the output that predicts its noise or velocity, by their positions."""

    latent: int
    velocity: int
    shared: tuple[int, int] | None = None
    """(axis, size) where they differ in channels: a latent with a condition concatenated to it has
    more, a prediction with a learned variance has more; the first `size` belong together. Or the
    last, of a sequence with other tokens in front."""
    packed: bool = False
    """Whether it is the last."""

    @classmethod
    def match(
        cls, latent: int, here: Sequence[int], velocity: int, there: Sequence[int]
    ) -> Denoised | None:
        """The pair, if an input of shape `here` and an output of shape `there` belong together."""
        if len(here) != len(there):
            return None
        differing = [axis for axis in range(len(here)) if here[axis] != there[axis]]
        if not differing:
            return cls(latent, velocity)
        axis = differing[0]
        if len(differing) > 1 or axis == 0 or len(here) < 3:
            return None
        # with conditions a latent is wider than its prediction; with learned variance, half as wide
        fits = here[axis] > there[axis] or 2 * here[axis] == there[axis]
        return cls(latent, velocity, (axis, min(here[axis], there[axis]))) if fits else None

    def is_all_of(self, velocity: Tensor) -> bool:
        """Whether all channels of the output move the latent; a learned variance does not."""
        return self.shared is None or velocity.shape[self.shared[0]] == self.shared[1]

    def part(self, tensor: Tensor) -> Tensor:
        """What latent and velocity have in common, as a view of either."""
        if self.shared is None:
            return tensor
        axis, size = self.shared
        return tensor.narrow(axis, tensor.shape[axis] - size if self.packed else 0, size)


@dataclass(frozen=True)
class Segment:
    """A run of tokens, such as the image or the text: a piece of an attention's sequence axis."""

    name: str
    length: int
    prunable: bool


@dataclass(frozen=True)
class CacheSlot:
    """A tensor that lives from step to step.

    Selective steps update some of these in place; batch and tokens are then the first two axes.
    Dense steps write all but the tables by time, which have one row per time.
    """

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


def share_out(lengths: Sequence[int], count: int) -> tuple[int, ...]:
    """Distribute `count` active tokens over segments in proportion to their lengths.

    Each segment gets at least one. All samples get the same share of a segment, so that rows stay
    rectangular. Raises ValueError unless len(lengths) <= count <= sum(lengths).
    """
    total = sum(lengths)
    if not len(lengths) <= count <= total:
        raise ValueError(f"{count} active tokens for segments of {list(lengths)}")
    spare = count - len(lengths)
    exact = [spare * (n - 1) / max(total - len(lengths), 1) for n in lengths]
    shares = [1 + math.floor(x) for x in exact]
    by_remainder = sorted(range(len(lengths)), key=lambda i: math.floor(exact[i]) - exact[i])
    for i in by_remainder[: count - sum(shares)]:
        shares[i] += 1
    return tuple(shares)


@dataclass(frozen=True)
class TableSources:
    """Positions of the inputs that tables by time are computed from."""

    scalars: tuple[int, ...]
    weights: tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    """All that the runtime knows of a graph: inputs, segments, caches, token-level output."""

    inputs: tuple[InputSpec, ...]
    segments: tuple[Segment, ...]
    caches: tuple[CacheSlot, ...]
    tokens: CacheSlot
    """The token-level output [B, N, C], which forecasts extrapolate: prunable segments one after
    another, padded to the widest."""
    lengths: tuple[int, ...]
    """Tokens of each prunable segment, in the order in which tokens are numbered."""
    denoised: tuple[Denoised, ...]
    """What is denoised; the main one (image, video) comes first."""
    time: int | None
    """Index of the time input, or None if none was found."""
    additive: bool
    """Whether the tail is additive: adding d to the token-level output adds d, rearranged, to what
    moves the latents, and changes nothing else."""
    tabulated_from: TableSources | None = None
    """What the tables by time (the last caches) are computed from, beside time and conditions; None
    if there are no tables."""
    samples_apart: bool = False
    """Whether each of the denoised is one sample, as where a model takes a list of them."""
    unselectable: str = ""
    """Why no tokens can be selected, so that steps are computed or forecast whole; empty if they
    can."""

    @property
    def batch(self) -> int:
        """B."""
        return self.tokens.shape[0]

    @property
    def prunable_tokens(self) -> int:
        """N."""
        return self.tokens.shape[1]

    @property
    def cache_bytes(self) -> int:
        """Bytes of one stream's caches."""
        return sum(slot.nbytes for slot in self.caches)

    @property
    def latent(self) -> int:
        """Index of the main input that is denoised."""
        return self.denoised[0].latent

    def time_input(self, inputs: Sequence[object]) -> Tensor:
        """The time among the flat inputs of a graph that has one."""
        assert self.time is not None
        time = inputs[self.time]
        assert isinstance(time, Tensor)
        return time

    def moving_parts(self, inputs: Sequence[object]) -> tuple[Tensor, ...]:
        """Of every input that is denoised, what its prediction moves, [B, ...]: mostly views."""
        return self._by_batch([(pair, inputs[pair.latent]) for pair in self.denoised])

    def moved_by(self, outputs: Sequence[object]) -> tuple[Tensor, ...]:
        """Of the outputs, what moves the `moving_parts`."""
        return self._by_batch([(pair, outputs[pair.velocity]) for pair in self.denoised])

    def _by_batch(self, pairs: Sequence[tuple[Denoised, object]]) -> tuple[Tensor, ...]:
        parts = tuple(pair.part(value) for pair, value in pairs if isinstance(value, Tensor))
        return (torch.stack(parts),) if self.samples_apart else parts

    def indices(self, role: InputRole) -> tuple[int, ...]:
        """Positions of the inputs with this role."""
        return tuple(spec.index for spec in self.inputs if spec.role == role)


@dataclass(frozen=True)
class Evaluation:
    """What one run of a program returns."""

    tokens: Tensor
    """Token-level output: [B, N, C], or [B, K, C] for the active rows of a selective run."""
    importance: Tensor | None = None
    """Attention received by each prunable token, float32 [B, N]; None where it was not measured."""


class Programs(Protocol):
    """The executable variants of one traced graph. `inputs` are always the graph's flat inputs."""

    @property
    def signature(self) -> Signature:
        """Inputs, caches and outputs of the programs."""

    @property
    def compile_seconds(self) -> Mapping[str, float]:
        """Seconds spent compiling each program built so far, by its name."""

    def probe(self, inputs: Sequence[object]) -> Tensor:
        """Compute every token; return the token-level output [B, N, C].

        Reads and writes no cache and measures no importance: for plans that never select tokens.
        """

    def dense(self, inputs: Sequence[object], caches: Sequence[Tensor]) -> Evaluation:
        """Compute every token; overwrite all caches but tables in place.

        Never reads the caches, so they may share memory if no later step reads them either.
        """

    def tabulate(
        self, inputs: Sequence[object], caches: Sequence[Tensor], later: Sequence[Tensor] = ()
    ) -> None:
        """Fill the tables among the caches: row 0 for the time of `inputs`, more for `later`.

        Args:
            inputs: the graph's inputs, with the first time.
            caches: the graph's caches, tables among them.
            later: further time inputs, fewer than TIMES_AT_ONCE.
        """

    def selective(
        self,
        inputs: Sequence[object],
        caches: Sequence[Tensor],
        active: Tensor,
        text: bool = True,
        importance: bool = True,
        row: int | None = None,
    ) -> Evaluation:
        """Compute the `active` tokens alone (int64 [B, K], ascending); update their cache rows.

        Args:
            inputs: the graph's inputs.
            caches: the graph's caches, updated in place.
            active: numbers of the tokens to compute.
            text: whether to compute text tokens too; otherwise the caches serve for them.
            importance: whether to measure importance.
            row: which row of the tables holds this time; None: fill the tables first.
        """

    def tail(self, inputs: Sequence[object], tokens: Tensor) -> list[Tensor]:
        """The graph's outputs from the token-level output [B, N, C]."""
