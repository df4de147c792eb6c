"""Samplers drawn at random, on a flow that is not trained.

A sampler's kind is one of a few answers to each question: which grid, which order, how much fresh
noise, what the caller changes, what specdiff is told.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

TOKENS, CHANNELS = 8, 4
FINE = 840
"""Pieces of the path that noise takes, so that fewer steps take the same one."""


class Flow(nn.Module):
    """A velocity [B, N, C] of all tokens, that bends with time."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mix = nn.Parameter(torch.randn(CHANNELS, CHANNELS, generator=generator) / 2)
        self.over = nn.Parameter(torch.randn(TOKENS, TOKENS, generator=generator) / 4)

    def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        clock = torch.sin(2 * timestep.reshape(-1, 1, 1))
        picture = torch.tanh(self.over @ hidden_states @ self.mix + condition + clock)
        return hidden_states - picture


@dataclass(frozen=True)
class Sampler:
    """How a generation steps, and who changes its latent."""

    steps: int
    shift: float
    rho: float
    """Of Karras's grid; 1: evenly spread, before the shift."""
    order: int
    """Of Adams-Bashforth, 1 to 3."""
    fresh: float
    """Share of the noise that each step renews."""
    noisy: tuple[float, float]
    """From which to which share of the run it does."""
    kept: int
    """Tokens that the caller replaces after each step: inpainting."""
    kicked: float | None
    """After which share of the run a callback moves the latent."""
    told: Literal["nothing", "session", "times", "scheduler"]

    def sigmas(self) -> list[float]:
        """Of all steps, and 0."""
        least = 0.02 ** (1 / self.rho)
        even = torch.linspace(1, least, self.steps, dtype=torch.float64) ** self.rho
        shifted = self.shift * even / (1 + (self.shift - 1) * even)
        return [*shifted.tolist(), 0.0]

    @property
    def is_known(self) -> bool:
        """Whether specdiff can place its plan and make good what forecasts cost.

        By the scheduler; else of first-order samplers, by the times where they are uneven.
        """
        even = self.rho == 1 or self.told == "times"
        by_scheduler = self.told == "scheduler" and not self.fresh  # which tells of no noise
        return by_scheduler or (self.order == 1 and even)


def drawn(model: Any, sampler: Sampler, seed: int = 0) -> Tensor:
    """A picture, [1, N, C]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, TOKENS, CHANNELS)
    latent, start, picture, kick = torch.randn(4, *shape, generator=generator)
    condition = 0.3 * torch.randn(shape, generator=generator)
    path = torch.randn(FINE, *shape, generator=generator)
    before: list[tuple[float, Tensor]] = []
    for index, (now, then) in enumerate(pairwise(sampler.sigmas())):
        with torch.no_grad():
            velocity = model(latent, torch.tensor([now]), condition)
        before = [(now, velocity), *before][: sampler.order]
        latent = _stepped(sampler, latent, before, then, path, index)
        if sampler.kept:
            there = then * start + (1 - then) * picture
            latent = torch.cat([there[:, : sampler.kept], latent[:, sampler.kept :]], dim=1)
        share, done = (index + 1) / sampler.steps, index / sampler.steps
        if sampler.kicked is not None and done < sampler.kicked <= share:
            latent = latent + 0.3 * kick
    return latent


def _stepped(
    sampler: Sampler, latent: Tensor, before: list[tuple[float, Tensor]], then: float,
    path: Tensor, index: int,
) -> Tensor:  # fmt: skip
    now, steps = before[0][0], sampler.steps
    mean = sum(
        weight * velocity
        for weight, (_, velocity) in zip(
            adams_bashforth([time for time, _ in before], then), before, strict=True
        )
    )
    assert isinstance(mean, Tensor)
    first, last = sampler.noisy
    if not sampler.fresh or not first <= index / steps < last or then == 0:
        return latent + (then - now) * mean
    clean, noise = latent - now * mean, latent + (1 - now) * mean
    pieces = path[round(FINE * index / steps) : round(FINE * (index + 1) / steps)]
    drawn = pieces.sum(0) / len(pieces) ** 0.5
    renewed = (1 - sampler.fresh**2) ** 0.5 * noise + sampler.fresh * drawn
    return (1 - then) * clean + then * renewed


def adams_bashforth(times: list[float], then: float) -> list[float]:
    """Weights of predictions, newest first: the mean of their polynomial from now to then."""
    powers = torch.arange(len(times), dtype=torch.float64)
    nodes = torch.tensor(times, dtype=torch.float64) - times[0]
    span = then - times[0]
    means = span**powers / (powers + 1)
    found: list[float] = torch.linalg.solve(nodes ** powers.unsqueeze(1), means).tolist()
    return found


class AsScheduler:
    """The sampler's steps as diffusers has its schedulers, for specdiff to read."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler, self.step_index = sampler, None
        self.sigmas = torch.tensor(sampler.sigmas())
        self.timesteps = self.sigmas[:-1]
        self.config = SimpleNamespace()
        self.before: list[tuple[float, Tensor]] = []

    def step(self, prediction: Tensor, time: Any, latent: Tensor, return_dict: bool = True) -> Any:
        index = self.step_index or 0
        self.before = [(float(self.sigmas[index]), prediction), *self.before][: self.sampler.order]
        plain, path = replace(self.sampler, fresh=0.0), torch.empty(0)
        then = float(self.sigmas[index + 1])
        self.step_index = index + 1
        return (_stepped(plain, latent, self.before, then, path, index),)
