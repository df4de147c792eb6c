"""The workflows of `workflows.py` that are loops of a user's own around a model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import diffusers
import torch
from torch import Tensor, nn
from workflow_drawing import Drawing, base, euler

from specdiff.models import demo

APART = 0.02
"""Size of what is added to a second expert's weights, as a share of theirs."""
Velocity = Callable[[Tensor, Tensor, float], Tensor]
"""(latent [1, 32, width, 48], time, share of the steps done) to the velocity."""


def by_hand(make: Callable[[nn.Module, str], Velocity], width: int = 32) -> Callable[[], Drawing]:
    """A loop of the user's own around the model and a scheduler."""

    def load() -> Drawing:
        model, steps_with = demo.load_transformer(), euler()()

        @torch.no_grad()
        def draw(steps: int, prompt: str, seed: int) -> Tensor:
            velocity = make(model, prompt)
            steps_with.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).numpy())
            latent = torch.randn(1, 32, width, 48, generator=torch.Generator().manual_seed(seed))
            for index, time in enumerate(steps_with.timesteps):
                found = velocity(latent, time, index / steps)
                latent = steps_with.step(found, time, latent, return_dict=False)[0]
            return (latent / 2 + 0.5).clamp(0, 1)

        return Drawing(model, steps_with, draw, lambda n: torch.empty(0))

    return load


def _call(model: nn.Module, latent: Tensor, time: Tensor, prompt: tuple[Tensor, Tensor]) -> Tensor:
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(32.0), torch.arange(32.0))
    found = model(
        hidden_states=latent.reshape(-1, 1024, 48), timestep=time.reshape(1) / 1000,
        encoder_hidden_states=prompt[0], pooled_projections=prompt[1], img_ids=ids,
        txt_ids=torch.zeros(demo.TEXT_TOKENS, 3), return_dict=False,
    )[0]  # fmt: skip
    return found.reshape(-1, 32, 32, 48)


def tiles(model: nn.Module, prompt: str) -> Velocity:
    """Two windows of one latent, half overlapping."""
    given = demo.prompt_embeddings([prompt])

    def velocity(latent: Tensor, time: Tensor, done: float) -> Tensor:
        total, count = torch.zeros_like(latent), torch.zeros(1, 1, latent.shape[2], 1)
        for left in (0, 16):
            part = slice(left, left + 32)
            total[:, :, part] += _call(model, latent[:, :, part], time, given)
            count[:, :, part] += 1
        return total / count

    return velocity


def anew(model: nn.Module, prompt: str) -> Velocity:
    """Prompt tensors made anew at each step, as ComfyUI makes them."""
    given = demo.prompt_embeddings([prompt])

    def velocity(latent: Tensor, time: Tensor, done: float) -> Tensor:
        return _call(model, latent, time, (torch.cat([given[0]]), torch.cat([given[1]])))

    return velocity


def cut_off(model: nn.Module, prompt: str) -> Velocity:
    """Guidance in calls of its own, for the first 60 % of the steps."""
    given, against = demo.prompt_embeddings([prompt]), demo.prompt_embeddings(["cactus"])

    def velocity(latent: Tensor, time: Tensor, done: float) -> Tensor:
        found = _call(model, latent, time, given)
        if done >= 0.6:
            return found
        return torch.lerp(_call(model, latent, time, against), found, 2.0)

    return velocity


def toggled(model: nn.Module, prompt: str) -> Velocity:
    """Guidance in calls of its own, at every other step."""
    given, against = demo.prompt_embeddings([prompt]), demo.prompt_embeddings(["cactus"])
    steps = itertools.count()

    def velocity(latent: Tensor, time: Tensor, done: float) -> Tensor:
        found = _call(model, latent, time, given)
        if next(steps) % 2:
            return found
        return torch.lerp(_call(model, latent, time, against), found, 2.0)

    return velocity


def two_experts() -> Drawing:
    """Two models that share a trajectory, half of the steps each, as Wan 2.2 has them."""
    second, generator = demo.load_transformer(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in second.parameters():
            apart = torch.randn(weight.shape, generator=generator)
            weight.add_(APART * weight.std(correction=0) * apart)

    def make(model: nn.Module, prompt: str) -> Velocity:
        given = demo.prompt_embeddings([prompt])

        def velocity(latent: Tensor, time: Tensor, done: float) -> Tensor:
            return _call(model if done < 0.5 else second, latent, time, given)

        return velocity

    return replace(by_hand(make)(), second=second)


def flow_edit() -> Drawing:
    """FlowEdit: a picture moved by how two prompts' velocities differ; noise anew each step."""
    model, times_by = demo.load_transformer(), euler()()

    @torch.no_grad()
    def draw(steps: int, prompt: str, seed: int) -> Tensor:
        source, target = demo.prompt_embeddings(["watermelon"]), demo.prompt_embeddings([prompt])
        generator = torch.Generator().manual_seed(seed)
        times_by.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).numpy())
        start = demo.pack(base() * 2 - 1).reshape(1, 32, 32, 48)
        latent = start
        for now, then in pairwise(times_by.sigmas[steps // 7 :]):
            noised = (1 - now) * start + now * torch.randn(start.shape, generator=generator)
            moved = latent + noised - start
            apart = _call(model, moved, 1000 * now, target) - _call(
                model, noised, 1000 * now, source
            )
            latent = latent + (then - now) * apart
        return (latent / 2 + 0.5).clamp(0, 1)

    return Drawing(model, times_by, draw, lambda n: torch.empty(0))


class Noise(nn.Module):
    """The demo model as one that predicts noise, on the usual noise schedule: the same pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = demo.load_transformer()
        self.kept = diffusers.DDIMScheduler().alphas_cumprod

    def forward(self, sample: Tensor, timestep: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
        """The noise [1, 32, 32, 48] in a sample of that shape."""
        signal, noise = self.kept[timestep].sqrt(), (1 - self.kept[timestep]).sqrt()
        latent, sigma = sample / (signal + noise), noise / (signal + noise)
        return latent + (1 - sigma) * _call(self.flow, latent, 1000 * sigma, (tokens, pooled))


def of_noise(name: str) -> Callable[[], Drawing]:
    """A loop around a model that predicts noise."""

    def load() -> Drawing:
        model = Noise()
        steps_with = getattr(diffusers, name)(clip_sample=False)

        @torch.no_grad()
        def draw(steps: int, prompt: str, seed: int) -> Tensor:
            given = demo.prompt_embeddings([prompt])
            steps_with.set_timesteps(steps)
            generator = torch.Generator().manual_seed(seed)
            latent = torch.randn(1, 32, 32, 48, generator=generator)
            for time in steps_with.timesteps:
                found = model(latent, time, *given)
                latent = steps_with.step(found, time, latent, generator=generator).prev_sample
            return (latent / 2 + 0.5).clamp(0, 1)

        return Drawing(model, steps_with, draw, lambda n: torch.empty(0))

    return load
