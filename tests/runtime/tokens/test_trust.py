"""Forecasts that miss much: evaluations are computed beside those of the quality's plan."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import specdiff
from specdiff.runtime.step.step import MISSED
from specdiff.runtime.tokens.trust import TRUSTED, Trust
from specdiff.settings import QUALITIES

STEPS = 28
TIMES = [3 * s / (1 + 2 * s) for s in torch.linspace(1, 0, STEPS + 1).tolist()]
DENSE = len(QUALITIES["balanced"].dense)


class Winding(nn.Module):
    """A flow whose prediction turns as often as is wished while time falls from 1 to 0."""

    def __init__(self, turns: float) -> None:
        super().__init__()
        self.turns = turns
        self.mix = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        angle = 2 * math.pi * self.turns * timestep.reshape(-1, 1, 1)
        return torch.sin(angle + condition) + 0.1 * self.mix(hidden_states)


@torch.no_grad()
def drawn(turns: float, given: bool, **options: Any) -> tuple[Tensor, specdiff.Stats]:
    """Euler's last latent; in a session with times, or by the calls alone."""
    torch.manual_seed(0)
    model = Winding(turns)
    latent, condition = torch.randn(1, 16, 8), torch.randn(1, 16, 8)
    specdiff.attach(model, **options)
    with specdiff.session(model, timesteps=TIMES[:-1] if given else None):
        for now, then in pairwise(TIMES):
            latent = latent + (then - now) * model(latent, torch.tensor([now]), condition)
    return latent, specdiff.stats(model)


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


def test_what_was_missed_is_read_late_and_shortens_the_way():
    trust, computed = Trust(), torch.ones(2, 4, 3)
    wrong = computed.clone()
    wrong[1] = -1  # the worst row counts: it missed twice its prediction
    trust.note(5, 0.2, wrong, computed, None)
    assert trust.reach(6, lag=2) == math.inf
    assert trust.reach(7, lag=2) == pytest.approx(0.2 * TRUSTED / 2)
    trust.note(8, 0.1, computed, computed, None)
    assert trust.reach(9, lag=1) == math.inf


def test_guidance_makes_what_was_missed_larger():
    trust, computed = Trust(), torch.ones(2, 4, 3)
    wrong = computed.clone()
    wrong[1] = 0.9  # guided: 1 + 7 * -0.1 = 0.3 for 1
    trust.note(5, 0.2, wrong, computed, 7.0)
    assert trust.reach(6, lag=1) == pytest.approx(0.2 * TRUSTED / 0.7, rel=1e-5)
