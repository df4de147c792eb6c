"""How far a method's pictures are from the dense ones, and what the method costs."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from specdiff.evaluation.features import feature_distance, features
from specdiff.measure.comparison import quality
from specdiff.measure.memory import held, peak, reset_peak
from specdiff.runtime.records.stats import Stats


@dataclass(frozen=True)
class Closeness:
    """One picture against the dense one of the same request."""

    psnr: float
    """dB; inf if equal."""
    ssim: float
    feature_distance: float
    latent_error: float
    """Euclidean distance of the final latents over the length of the dense one's."""


def latent_error(latents: Tensor, reference: Tensor) -> float:
    """Relative Euclidean distance, in float64."""
    difference = (latents.double() - reference.double()).norm()
    return float(difference / reference.double().norm())


def closeness(
    picture: Tensor,
    reference: Tensor,
    latents: Tensor,
    reference_latents: Tensor,
    device: torch.device,
) -> Closeness:
    """Compare pictures `[H, W, 3]` and their latents; the network looks at them on `device`."""
    near = quality(picture, reference)
    pictures = (one.permute(2, 0, 1)[None].to(device) for one in (picture, reference))
    seen, expected = map(features, pictures)
    return Closeness(
        near.psnr,
        near.ssim,
        float(feature_distance(seen, expected)),
        latent_error(latents, reference_latents),
    )


def time_ratio(dense: Sequence[float], other: Sequence[float]) -> float:
    """Speedup: the median over rounds of dense time over the method's, in the same round."""
    return statistics.median(a / b for a, b in zip(dense, other, strict=True))


def flop_counter() -> FlopCounterMode:
    """Counts matrix products and attention; the CPU's flash attention is missing from torch's."""

    def cpu_attention(query: object, key: object, value: object, *args: object, **_: object) -> int:
        return int(sdpa_flop_count(query, key, value))

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={kernel: cpu_attention})


def flops_share(step_flops: Callable[[int | None], int], usage: Stats, steps: int) -> float:
    """FLOPs of one specdiff picture over a dense one's, from its counters and the cost model.

    A selective step's FLOPs are affine in its tokens, so their mean number gives the sum exactly.
    """
    full = usage.dense + usage.speculative
    spent = full * step_flops(None)
    if usage.selective:
        per_dense = usage.tokens_total / (usage.dense + usage.selective + usage.skipped)
        active = (usage.tokens_computed - full * per_dense) / usage.selective
        rows = usage.token_counts.shape[0] if usage.token_counts is not None else 1
        spent += usage.selective * step_flops(round(active / rows))
    return spent / (steps * step_flops(None))


class PeakMemory:
    """The most memory a method holds while it draws, in bytes, above what was held at the start.

    On CUDA what torch allocated; elsewhere the process's resident high-water mark of Linux, which
    is coarse: it includes what compiling left behind. Start it before the method's pipeline is
    loaded, call `restart` after its first picture, read `bytes` at the end; None where unknown.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        _give_back()
        self.before = held(device)

    def restart(self) -> None:
        """Forget the peak of compiling."""
        reset_peak(self.device)

    @property
    def bytes(self) -> int | None:
        """The peak since `restart`."""
        most = peak(self.device)
        return None if most is None or self.before is None else max(0, most - self.before)


def _give_back() -> None:
    """Return freed memory to the system, as far as the C library can."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
