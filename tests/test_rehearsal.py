"""Rehearsal: what plans cost, told by dense latents alone."""

import itertools
import math
import random

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

import specdiff
from specdiff.plan import Plan
from specdiff.tuning.rehearsal import Rehearsal, computed_by
from specdiff.tuning.tuner import tune
from tests.runtime.toy import Euler, toy

SIGMAS = [3 * s / (1 + 2 * s) for s in (1 - i / 12 for i in range(13))]


class Bending(nn.Module):
    """Goes the same way wherever its latent is, so that a rehearsal tells all."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, generator=torch.Generator().manual_seed(3)))

    def forward(self, latent: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        angle = 4 * timestep.reshape(-1, 1, 1) * self.weight.cos()
        return (angle.sin() + self.weight).expand_as(latent)


def latents(model: nn.Module, seed: int = 0) -> list[torch.Tensor]:
    """Where Euler goes, by a plan or densely."""
    x = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(seed))
    path = [x]
    for here, there in itertools.pairwise(SIGMAS):
        x = x + (there - here) * model(x, torch.full((1,), here))
        path.append(x)
    return path


def rehearsed(model: nn.Module, count: int = 1) -> Rehearsal:
    found = Rehearsal()
    for seed in range(count):
        dense = specdiff.session(model, SIGMAS[:-1], cache_ratio=0.0)
        with dense, specdiff.record(model, latents=True) as recording:
            latents(model, seed)
        found.watch(recording.steps)
    return found


@torch.no_grad()
def test_it_tells_how_far_each_plan_leads():
    """All of the runtime goes into it: lines, how far they are followed, corrections."""
    model = Bending()
    specdiff.attach(model)
    guess = rehearsed(model).guess()
    dense, draw = latents(Bending()), random.Random(0)
    for count in (2, 3, 5, 8, 11):
        places = (0, *sorted(draw.sample(range(1, 11), count - 2)), 11)
        with specdiff.session(model, SIGMAS[:-1], plan=Plan.of(12, places)):
            path = latents(model)
        apart = [one - other for one, other in zip(path, dense, strict=True)]
        squares = [float((b - a).square().mean()) for a, b in itertools.pairwise(apart)]
        weighed = [math.exp(2 * sigma) * each for sigma, each in zip(SIGMAS, squares, strict=False)]
        assert guess(places) == pytest.approx(-10 * math.log10(sum(weighed[:-1])), abs=0.01)
    assert guess(tuple(range(12))) > 110


def scheduler_of(kind: str) -> FlowMatchEulerDiscreteScheduler:
    """Stable Diffusion 3's, whose last step is hardly one; or times that are no flow's."""
    found = FlowMatchEulerDiscreteScheduler(shift=3.0, use_beta_sigmas=kind == "beta")
    found.set_timesteps(28)
    return found


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("kind", ["usual", "beta"])
@torch.no_grad()
def test_it_places_plans_as_the_runtime_does(kind, told):
    model, draw = Bending(), random.Random(0)
    scheduler = scheduler_of(kind)
    times = scheduler.timesteps.tolist()
    specdiff.attach(model, scheduler=scheduler if told else None)
    differ = False
    for count in (3, 8, 15, 20):
        places = (0, *sorted(draw.sample(range(1, 28), count - 1)))
        latent = torch.randn(1, 4, 16)
        with specdiff.session(model, plan=Plan.of(28, places)), specdiff.record(model) as run:
            for here, there in itertools.pairwise([*times, 0.0]):
                latent = latent + (there - here) / 1000 * model(latent, torch.tensor([here]))
        known = [step.time for step in run.steps if step.time is not None]
        dense = tuple(step.index for step in run.steps if step.kind == "dense")
        assert run.steps[0].told is told
        assert computed_by(known, told=told)(places) == dense
        differ |= places != dense
    assert differ


@torch.no_grad()
def test_pictures_count_alike():
    model = Bending()
    specdiff.attach(model)
    one, two = rehearsed(model).guess(), rehearsed(model, 2).guess()
    assert one((0, 3, 7, 11)) == pytest.approx(two((0, 3, 7, 11)), abs=1e-3)


def test_what_was_not_kept_tells_nothing():
    assert Rehearsal().guess() is None
    model = toy()
    with specdiff.record(model) as recording:
        Euler(model, steps=4).run()
    assert recording.steps[0].latent is None
    found = Rehearsal()
    found.watch(recording.steps)
    assert found.guess() is None


@torch.no_grad()
def test_tuning_draws_what_was_rehearsed(monkeypatch):
    """So that a plan of fewer evaluations is found with as few of them."""
    model = Bending()
    specdiff.attach(model)

    def picture(seed: int) -> torch.Tensor:
        return latents(model, seed)[-1] / 8 + 0.5

    tuned = tune(model, picture, target=80, prompts=1, budget=12 + 40)
    monkeypatch.setattr(Rehearsal, "guess", lambda self: None)
    blind = tune(model, picture, target=80, prompts=1, budget=12 + 40)
    assert tuned.score >= 80 and len(tuned.plan.dense) < len(blind.plan.dense)
