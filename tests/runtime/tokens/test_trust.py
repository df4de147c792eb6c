"""Forecasts that miss much: evaluations are computed beside those of the quality's plan."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import specdiff
from specdiff.options import Options
from specdiff.runtime.sampler.guides import share, shares_by_scale
from specdiff.runtime.step.step import MISSED
from specdiff.runtime.tokens.trust import Trust
from specdiff.settings import QUALITIES, TRUSTED

STEPS = 28
TIMES = [3 * s / (1 + 2 * s) for s in torch.linspace(1, 0, STEPS + 1).tolist()]
DENSE = len(QUALITIES["balanced"].dense)
HALF = 0.5


class Winding(nn.Module):
    """A flow whose prediction turns as often as is wished while time falls from 1 to 0."""

    def __init__(self, turns: float) -> None:
        super().__init__()
        self.turns = turns
        self.mix = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        angle = 2 * math.pi * self.turns * timestep.reshape(-1, 1, 1)
        return torch.sin(angle + condition) + 0.1 * self.mix(hidden_states)


def winding(turns: float, **options: Any) -> tuple[nn.Module, Tensor, Tensor]:
    """An accelerated model, where its latent starts, and its condition."""
    torch.manual_seed(0)
    model = Winding(turns)
    latent, condition = torch.randn(1, 16, 8), torch.randn(1, 16, 8)
    specdiff.attach(model, **options)
    return model, latent, condition


@torch.no_grad()
def draw(model: nn.Module, latent: Tensor, condition: Tensor, given: bool) -> Tensor:
    """Euler's last latent; in a session with times, or by the calls alone."""
    with specdiff.session(model, timesteps=TIMES[:-1] if given else None):
        for now, then in pairwise(TIMES):
            latent = latent + (then - now) * model(latent, torch.tensor([now]), condition)
    return latent


def drawn(turns: float, given: bool, **options: Any) -> tuple[Tensor, specdiff.Stats]:
    """The same of a new model, and what was counted."""
    model, latent, condition = winding(turns, **options)
    return draw(model, latent, condition, given), specdiff.stats(model)


def error(turns: float, given: bool, **options: Any) -> float:
    dense, _ = drawn(turns, given, quality="dense")
    ours, _ = drawn(turns, given, **options)
    return float((ours - dense).norm() / dense.norm())


@pytest.mark.parametrize("given", [False, True])
def test_a_trajectory_that_bends_much_is_computed_more_often(given):
    _, counts = drawn(2.5, given)
    assert DENSE + 3 <= counts.dense < STEPS
    assert counts.fallbacks[MISSED] == counts.dense - DENSE
    plan = QUALITIES["balanced"]
    assert error(2.5, given) < error(2.5, given, plan=plan) / 3


@pytest.mark.parametrize("given", [False, True])
def test_a_smooth_one_has_the_plan(given):
    _, counts = drawn(0.3, given)
    assert counts.dense == DENSE and not counts.fallbacks


def test_a_plan_that_is_given_is_followed_as_it_is():
    _, counts = drawn(2.5, given=True, plan=QUALITIES["balanced"])
    assert counts.dense == DENSE and MISSED not in counts.fallbacks


@pytest.mark.parametrize("given", [False, True])
def test_who_asks_for_more_trusts_less(given):
    _, usual = drawn(0.4, given)
    _, strict = drawn(0.4, given, ablation={"trusted": TRUSTED["closest"]})
    assert strict.dense > usual.dense


def test_each_quality_trusts_as_it_says_and_a_given_plan_is_followed():
    found = {name: Options(quality=name).resolve().trusted for name in QUALITIES}
    assert found == TRUSTED and Options().resolve().trusted == TRUSTED["balanced"]
    assert not Options(plan=QUALITIES["fast"]).resolve().trusted
    assert not Options(method="paper", quality="fast").resolve().trusted


def test_the_first_prediction_is_judged_as_it_stands():
    """Evaluation 1 shows what it missed; that is read in time for the first gap."""
    model, latent, condition = winding(8.0)
    with specdiff.record(model) as recording:
        draw(model, latent, condition, given=True)
    beside = [step.index for step in recording.steps if step.reason == MISSED]
    assert beside[0] == 3


def test_what_was_missed_is_read_late_and_shortens_the_way():
    trust, computed = Trust(), torch.ones(2, 4, 3)
    wrong = computed.clone()
    wrong[1] = -1  # the worst row counts: it missed twice its prediction
    missed = share(wrong - computed, computed)
    trust.note(5, 0.2, missed.max())
    assert trust.reach(6, lag=2, trusted=HALF) == math.inf
    assert trust.reach(7, lag=2, trusted=HALF) == pytest.approx(0.2 * HALF / 2)
    trust.note(8, 0.1, torch.tensor(0.0))
    assert trust.reach(9, lag=1, trusted=HALF) == math.inf


def test_guidance_makes_what_was_missed_larger():
    trust, computed = Trust(), torch.ones(2, 4, 3)
    wrong = computed.clone()
    wrong[1] = 0.9  # guided: 1 + 7 * -0.1 = 0.3 for 1
    trust.note(5, 0.2, shares_by_scale(wrong - computed, computed, 7.0).max())
    assert trust.reach(6, lag=1, trusted=HALF) == pytest.approx(0.2 * HALF / 0.7, rel=1e-5)


def test_who_knows_better_is_believed():
    trust = Trust()
    for missed in (0.1, 2.0):
        trust.note(5, 0.2, torch.tensor(missed))
    assert trust.reach(6, lag=1, trusted=HALF) == pytest.approx(0.2 * HALF / 2)


class Pulled(nn.Module):
    """A flow that is smooth but for what a condition adds, which winds by little."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        angle = 5 * math.pi * timestep.reshape(-1, 1, 1)
        return self.mix(hidden_states) + 0.15 * condition * torch.sin(angle + condition)


SCALE = 7.0


def batched(model: nn.Module, latent: Tensor, now: float, condition: Tensor) -> Tensor:
    """The halves in one batch, the unconditional one last."""
    both = torch.cat([condition, torch.zeros_like(condition)])
    with_it, without = model(torch.cat([latent] * 2), torch.full((2,), now), both).chunk(2)
    return torch.lerp(without, with_it, SCALE)


def called_twice(model: nn.Module, latent: Tensor, now: float, condition: Tensor) -> Tensor:
    """A call for each half."""
    time = torch.tensor([now])
    with_it = model(latent, time, condition)
    return torch.lerp(model(latent, time, NOTHING), with_it, SCALE)


def called_for_each_picture(
    model: nn.Module, latent: Tensor, now: float, condition: Tensor
) -> Tensor:
    """Halves next to each other in a batch of two pictures."""
    codes = torch.cat([condition, NOTHING, 0.5 * condition, NOTHING])
    latents = latent.repeat_interleave(2, 0)
    with_it, without = model(latents, torch.full((4,), now), codes).unflatten(0, (2, 2)).unbind(1)
    return torch.lerp(without, with_it, SCALE)


NOTHING = torch.zeros(1, 16, 8)
WAYS = {"batched": (batched, 1), "twice": (called_twice, 1), "apart": (called_for_each_picture, 2)}


@torch.no_grad()
def guided(way: str, given: bool, **options: Any) -> tuple[Tensor, specdiff.Stats]:
    """As `drawn`, of guided pictures whose scale nobody told."""
    torch.manual_seed(0)
    model, (velocity, pictures) = Pulled(), WAYS[way]
    latent, condition = torch.randn(pictures, 16, 8), torch.randn(1, 16, 8)
    specdiff.attach(model, **options)
    with specdiff.session(model, timesteps=TIMES[:-1] if given else None):
        for now, then in pairwise(TIMES):
            latent = latent + (then - now) * velocity(model, latent, now, condition)
    return latent, specdiff.stats(model)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_guidance_counts_whoever_tells_its_scale(way, given):
    _, counts = guided(way, given)
    calls = 2 if way == "twice" else 1
    assert counts.dense >= calls * (DENSE + 3)
    assert counts.dense % calls == 0  # the halves keep step
    assert counts.fallbacks[MISSED] >= calls * 3
    exact, _ = guided(way, given, quality="dense")
    planned, _ = guided(way, given, plan=QUALITIES["balanced"])
    ours, _ = guided(way, given)
    assert (ours - exact).norm() < (planned - exact).norm() / 2
