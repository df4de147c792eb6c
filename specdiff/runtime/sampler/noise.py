"""How a sampler moves a latent in one step: along a flow, or on a noise schedule."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

BETAS = (
    ("linear", 1e-4, 0.02),
    ("scaled_linear", 0.00085, 0.012),
    ("scaled_linear", 0.00085, 0.03),
)
"""Noise schedules in use, as diffusers' schedulers name them, over 1000 times: DiT and PixArt,
Stable Diffusion, HunyuanDiT."""
LEAST_SIGNAL = 1e-8
"""What the alpha-bar of a schedule that ends in pure noise counts as, so that it divides."""


@dataclass(frozen=True)
class Flow:
    """x' = x + rate (t' - t) v, where the rate is left to be measured."""

    free: ClassVar[bool] = True

    def jump(self, start: float, end: float) -> tuple[float, float]:
        """(a, b) of x' = a x + b v for a rate of 1."""
        return 1.0, end - start

    def step(self, start: float, end: float) -> tuple[float, float, float]:
        """As `jump`, with the variance of the noise that the sampler adds: none."""
        return 1.0, end - start, 0.0

    def clock(self, time: float) -> float:
        """As of `Diffusion`: time itself."""
        return time


@dataclass(frozen=True)
class Diffusion:
    """x = sqrt(abar) x0 + sqrt(1 - abar) eps, with a model that predicts eps or v.

    v = sqrt(abar) eps - sqrt(1 - abar) x0 (Salimans and Ho 2022, appendix D).
    """

    kind: Literal["epsilon", "v"]
    alphas_cumprod: tuple[float, ...]
    """abar at the times 0, 1, ..."""
    ancestral: bool = False
    """Whether the sampler adds fresh noise, as DDPM does."""
    free: ClassVar[bool] = False

    def jump(self, start: float, end: float) -> tuple[float, float]:
        """(a, b) of x' = a x + b prediction: DDIM (Song et al. 2021, equation 12, sigma = 0).

        First-order DPM-Solver++, and Euler on a latent scaled to unit variance, are the same step.
        """
        return self._weights(start, end, 0.0)

    def step(self, start: float, end: float) -> tuple[float, float, float]:
        """(a, b, s²) of x' = a x + b prediction + s noise: what the sampler does.

        s² is that of DDPM (Song et al. 2021, equation 16, eta = 1), which Euler ancestral and
        first-order SDE-DPM-Solver++ share, or 0.
        """
        (signal, noise), (new_signal, new_noise) = self._levels(start), self._levels(end)
        variance = 0.0
        if self.ancestral and noise > 0:
            variance = max((new_noise / noise) ** 2 * (1 - (signal / new_signal) ** 2), 0.0)
        return (*self._weights(start, end, variance), variance)

    def clock(self, time: float) -> float | None:
        """Where the latent's path, over its signal, moves by the prediction times this.

        None where no such clock is known: a step by v turns, and noise is no prediction.
        """
        if self.kind == "v" or self.ancestral:
            return None
        signal, noise = self._levels(time)
        return noise / signal

    def _weights(self, start: float, end: float, variance: float) -> tuple[float, float]:
        """Equation 12: x' = sqrt(abar') x0 + sqrt(1 - abar' - s²) eps, in x and the prediction."""
        (signal, noise), (new_signal, new_noise) = self._levels(start), self._levels(end)
        rest = math.sqrt(max(new_noise**2 - variance, 0.0))
        if self.kind == "epsilon":
            ratio = new_signal / signal
            return ratio, rest - ratio * noise
        return new_signal * signal + rest * noise, rest * signal - new_signal * noise

    def _levels(self, time: float) -> tuple[float, float]:
        """(sqrt(abar), sqrt(1 - abar)); between two times of the table on the line."""
        last = len(self.alphas_cumprod) - 1
        time = min(max(time, 0.0), float(last))
        below = min(int(time), last - 1)
        low, high = self.alphas_cumprod[below : below + 2]
        abar = max(low + (time - below) * (high - low), LEAST_SIGNAL)
        return math.sqrt(abar), math.sqrt(1 - abar)


Process = Flow | Diffusion


@functools.lru_cache(maxsize=32)
def processes(prediction: str, alphas_cumprod: tuple[float, ...] | None) -> tuple[Process, ...]:
    """What a trajectory may follow, the flow first, samplers that add no noise before others.

    Args:
        prediction: "flow", "epsilon", "v", or "auto" for all of them.
        alphas_cumprod: abar at the times 0, 1, ..., or None for all of the usual schedules.
    """
    kinds: tuple[Literal["epsilon", "v"], ...] = ("epsilon", "v")
    wanted = [kind for kind in kinds if prediction in ("auto", kind)]
    tables = usual_tables() if alphas_cumprod is None else (alphas_cumprod,)
    flow = (Flow(),) if prediction in ("auto", "flow") else ()
    diffusions = (
        Diffusion(kind, table, ancestral)
        for ancestral in (False, True)
        for kind in wanted
        for table in tables
    )
    return (*flow, *diffusions)


@functools.cache
def usual_tables() -> tuple[tuple[float, ...], ...]:
    """The abar of each schedule in `BETAS`, in float32 as diffusers has them."""
    tables = []
    for name, low, high in BETAS:
        power = 2 if name == "scaled_linear" else 1
        roots = torch.linspace(
            low ** (1 / power), high ** (1 / power), 1000, dtype=torch.float32, device="cpu"
        )
        tables.append(tuple((1 - roots**power).cumprod(0).tolist()))
    return tuple(tables)
