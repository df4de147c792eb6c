"""Comparison: measure methods against each other in turns: time, closeness, tokens.

The first method is the reference: the others' pictures and times are compared with its own.
Pictures are float32 [H, W, 3] with values in 0..1; times are wall-clock seconds per picture.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Protocol

import torch
from torch import Tensor

from specdiff.measure.timing import in_turns, timed
from specdiff.models.subject import Request

AXES_OF_A_PICTURE = 3


class Usage(Protocol):
    """What a comparison reads of `specdiff.Stats`; all counts are since the last reset."""

    @property
    def tokens_computed(self) -> int:
        """Tokens that went through the network, look-ahead included."""

    @property
    def tokens_total(self) -> int:
        """Tokens that dense steps would have computed."""

    @property
    def cache_bytes(self) -> int:
        """Bytes held in caches."""

    @property
    def compile_seconds(self) -> Mapping[str, float]:
        """Seconds spent compiling each program."""

    @property
    def fallbacks(self) -> Mapping[str, int]:
        """How often a step ran dense against the plan, by reason."""

    @property
    def token_counts(self) -> Tensor | None:
        """How often each token was computed in the latest run, int [B, N]."""


@dataclass(frozen=True)
class Method:
    """One way to make pictures.

    Attributes:
        name: How the method is called in tables and pictures.
        steps: Denoising steps of one picture.
        generate: Makes one picture, on the CPU when it returns.
        usage: Reads the runtime's counters; None if every token is computed at every step.
        options: Options the method was compiled with, as they are to be written down.
        compiles: Whether its first picture pays for a compilation of its own.
        model: The compiled model, where the steps of its runtime can be recorded.
    """

    name: str
    steps: int
    generate: Callable[[Request], Tensor]
    usage: Callable[[], Usage] | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    compiles: bool = True
    model: torch.nn.Module | None = None


@dataclass(frozen=True)
class Quality:
    """How close a picture is to the reference: PSNR in dB (inf if equal) and SSIM (at most 1)."""

    psnr: float
    ssim: float


@dataclass
class Trials:
    """All that was observed of one method; lists have one entry per request."""

    method: Method
    seconds: list[list[float]]
    images: list[Tensor]
    counts: list[Tensor | None]
    qualities: list[Quality]
    first_seconds: float = 0.0
    tokens_before: tuple[int, int] = (0, 0)
    """Computed and in all, after the first picture, which compiles."""
    tokens_computed: int = 0
    tokens_total: int = 0
    cache_bytes: int = 0
    program_seconds: Mapping[str, float] = field(default_factory=dict)
    fallbacks: Mapping[str, int] = field(default_factory=dict)

    @property
    def median_seconds(self) -> float:
        """Median over all requests and rounds, compilation excluded."""
        return statistics.median(second for row in self.seconds for second in row)

    @property
    def compile_seconds(self) -> float:
        """How much longer the first picture took than a usual one."""
        return max(0.0, self.first_seconds - self.median_seconds) if self.method.compiles else 0.0

    @property
    def psnr(self) -> float:
        """Mean PSNR over the requests, dB."""
        return statistics.fmean(quality.psnr for quality in self.qualities)

    @property
    def ssim(self) -> float:
        """Mean SSIM over the requests."""
        return statistics.fmean(quality.ssim for quality in self.qualities)


@dataclass(frozen=True)
class Comparison:
    """The trials of every method on the same requests; the first method is the reference."""

    requests: Sequence[Request]
    trials: Sequence[Trials]

    @property
    def reference(self) -> Trials:
        """The trials that the others are compared with."""
        return self.trials[0]

    def speedup(self, trials: Trials) -> float:
        """Median time of the reference over the method's own."""
        return self.reference.median_seconds / trials.median_seconds

    def tokens_share(self, trials: Trials) -> float:
        """Tokens computed, as a share of those the reference computes for the same pictures."""
        share = trials.tokens_computed / trials.tokens_total if trials.tokens_total else 1.0
        return share * trials.method.steps / self.reference.method.steps


def worst_tenth(values: Sequence[float]) -> float:
    """Mean of the lowest tenth, one value at least."""
    return statistics.fmean(sorted(values)[: max(1, round(len(values) / 10))])


def psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures with data range 1, computed in float64."""
    error = (image.double() - reference.double()).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(image: Tensor, reference: Tensor) -> float:
    """Structural similarity of Wang et al. (Gaussian window, sigma 1.5), data range 1."""
    from skimage.metrics import structural_similarity

    value = structural_similarity(
        image.double().numpy(),
        reference.double().numpy(),
        data_range=1.0,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    return float(value)


def quality(image: Tensor, reference: Tensor) -> Quality:
    """Compare two pictures of shape [H, W, 3].

    Raises:
        ValueError: The shapes differ or are not those of a picture.
    """
    if image.shape != reference.shape or image.dim() != AXES_OF_A_PICTURE:
        raise ValueError(f"cannot compare {tuple(image.shape)} with {tuple(reference.shape)}")
    return Quality(psnr(image, reference), ssim(image, reference))


def _warm_up(method: Method, request: Request) -> Trials:
    """Compile by making one picture that is not counted."""
    trials = Trials(method, [], [], [], [])
    if method.compiles:
        trials.first_seconds = timed(lambda: method.generate(request))[1]
    if method.usage is not None:
        usage = method.usage()
        trials.tokens_before = usage.tokens_computed, usage.tokens_total
    return trials


def _record(trials: Trials, index: int, image: Tensor, seconds: float) -> None:
    """Add what was observed of one picture; later rounds only add their time."""
    usage = trials.method.usage() if trials.method.usage is not None else None
    if usage is not None:
        computed, total = trials.tokens_before
        trials.tokens_computed = usage.tokens_computed - computed
        trials.tokens_total = usage.tokens_total - total
        trials.cache_bytes = max(trials.cache_bytes, usage.cache_bytes)
        trials.program_seconds = dict(usage.compile_seconds)
        trials.fallbacks = dict(usage.fallbacks)
    if index < len(trials.images):
        trials.seconds[index].append(seconds)
        return
    trials.seconds.append([seconds])
    trials.images.append(image)
    counts = usage.token_counts if usage is not None else None
    trials.counts.append(counts.clone() if counts is not None else None)


def count_images(methods: Sequence[Method], requests: Sequence[Request], repeats: int) -> int:
    """How many pictures `compare` makes, and so how often it calls `on_image`."""
    warm_ups = sum(method.compiles for method in methods)
    return warm_ups + repeats * len(requests) * len(methods)


@torch.no_grad()
def compare(
    methods: Sequence[Method],
    requests: Sequence[Request],
    repeats: int,
    on_image: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Make every request with every method, the methods taking turns.

    Args:
        methods: At least one; the first is the reference.
        requests: At least one picture to make.
        repeats: Rounds; each makes every picture once with every method.
        on_image: Called before each picture with a line for a progress bar.

    Returns:
        Times of all rounds, pictures and token counts of the first.
    """
    trials = []
    for method in methods:
        if method.compiles:
            on_image(f"compiling {method.name}")
        trials.append(_warm_up(method, requests[0]))
    turns = in_turns(
        trials,
        product(range(1, repeats + 1), range(len(requests))),
        lambda one, task: one.method.generate(requests[task[1]]),
        before=lambda one, task: on_image(
            f"round {task[0]}: {requests[task[1]].prompt}, {one.method.name}"
        ),
    )
    for one, (_, index), image, seconds in turns:
        _record(one, index, image, seconds)
    for one in trials:
        pairs = zip(one.images, trials[0].images, strict=True)
        one.qualities = [quality(image, reference) for image, reference in pairs]
    return Comparison(requests, trials)
