"""Whole steps where rows, or tokens of a row, are at times of their own."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import specdiff
from specdiff.plan import Plan
from specdiff.runtime.step.fallbacks import ROWS_APART
from tests.runtime.blocks.test_whole_steps import CONDITION, DENSE, STEPS, Denoiser, Forms, latents


def times_of(starts: list[float], steps: int = STEPS, shift: float = 3.0) -> Tensor:
    """[steps + 1, B]: each row from a time of its own to 0, shifted towards noise."""
    even = torch.linspace(1, 0, steps + 1).unsqueeze(1) * torch.tensor(starts)
    return shift * even / (1 + (shift - 1) * even)


@torch.no_grad()
def drawn_apart(model: nn.Module, times: Tensor, rows: slice = slice(None)) -> Tensor:
    """Euler on a flow, each row [B] in its own time; some rows only."""
    latent, condition = latents()[rows], CONDITION[rows].clone()
    for now, then in pairwise(times[:, rows]):
        latent = latent + (then - now).reshape(-1, 1, 1) * model(latent, now, condition)
    return latent


def test_rows_at_times_of_their_own_are_forecast():
    model, times = Denoiser(), times_of([1.0, 0.6])
    expected = drawn_apart(model, times)
    specdiff.attach(model)
    found = drawn_apart(model, times)
    stats = specdiff.stats(model)
    assert stats.skipped >= STEPS - DENSE - 1 and not stats.fallbacks
    assert ((found - expected).norm() / expected.norm()).item() < 2e-3


@pytest.mark.parametrize("forecast", ["reuse", "linear", "mean"])
def test_rows_at_times_of_their_own_are_as_alone(forecast):
    """Forecast and corrected as alone, given the same steps of the plan."""
    model, times = Denoiser(), times_of([1.0, 0.6])
    expected = drawn_apart(model, times)
    plan = Plan.every(3, warmup=3)
    specdiff.attach(model, plan=plan, cache_ratio=1.0, forecast=forecast)
    together = drawn_apart(model, times)
    for row in range(2):
        specdiff.reset(model)
        alone = drawn_apart(model, times, slice(row, row + 1))
        error = (alone - expected[row]).norm()
        assert (together[row] - alone[0]).norm() < (0.05 * error if forecast != "mean" else error)


def test_rows_that_move_against_each_other_are_computed():
    model, times = Denoiser(), times_of([1.0, 0.6])
    times = torch.stack([times[:, 0], times[:, 1].flip(0)], 1)
    expected = drawn_apart(model, times)
    specdiff.attach(model)
    torch.testing.assert_close(drawn_apart(model, times), expected)
    assert specdiff.stats(model).fallbacks == {"time differs between batch rows": STEPS // 2}


def test_rows_apart_in_a_session_with_one_list_of_times_are_computed(caplog):
    model, times = Denoiser(), times_of([1.0, 0.6])
    expected = drawn_apart(model, times)
    specdiff.attach(model)
    with specdiff.session(model, timesteps=times[:-1, 0]):
        torch.testing.assert_close(drawn_apart(model, times), expected)
    assert set(specdiff.stats(model).fallbacks) == {ROWS_APART}
    assert "specdiff.rows(model, sessions)" in caplog.text


def test_rows_together_in_a_session_with_times_are_forecast():
    model, times = Denoiser(), times_of([1.0, 1.0])
    specdiff.attach(model)
    with specdiff.session(model, timesteps=times[:-1, 0]):
        drawn_apart(model, times)
    stats = specdiff.stats(model)
    assert stats.skipped == STEPS - DENSE and not stats.fallbacks


def test_a_row_that_begins_again_begins_the_batch_again():
    model, times = Denoiser(), times_of([1.0, 0.6])
    times[STEPS // 2 :, 1] = times_of([1.0])[: STEPS // 2 + 1, 0]
    expected = drawn_apart(model, times)
    specdiff.attach(model)
    found = drawn_apart(model, times)
    stats = specdiff.stats(model)
    assert stats.skipped > STEPS // 3 and not stats.fallbacks
    assert ((found - expected).norm() / expected.norm()).item() < 2e-2


def given_first(sigma: float) -> Tensor:
    """[2, 6]: the first two tokens are given, so at time 0."""
    return torch.full((2, 6), sigma).index_fill(1, torch.tensor([0, 1]), 0.0)


@torch.no_grad()
def drawn_by_token(model: nn.Module, times: Any) -> Tensor:
    """Euler on a flow, each token [B, 6] in its own time."""
    latent = latents()
    for now, then in pairwise(torch.linspace(1, 0, STEPS + 1).tolist()):
        step = (times(then) - times(now)).unsqueeze(-1)
        latent = latent + step * model(latent, times(now), CONDITION)
    return latent


def test_given_frames_at_time_0():
    model = Forms.TimeOfEachToken()
    expected = drawn_by_token(model, given_first)
    specdiff.attach(model)
    found = drawn_by_token(model, given_first)
    stats = specdiff.stats(model)
    assert (stats.dense, stats.skipped, stats.fallbacks) == (DENSE, STEPS - DENSE, {})
    assert ((found - expected).norm() / expected.norm()).item() < 2e-3


def test_tokens_at_many_times_are_computed():
    """As in diffusion forcing."""
    model = Forms.TimeOfEachToken()
    scale = torch.linspace(1, 0.5, 6)
    expected = drawn_by_token(model, lambda sigma: (sigma * scale).expand(2, 6))
    specdiff.attach(model)
    found = drawn_by_token(model, lambda sigma: (sigma * scale).expand(2, 6))
    torch.testing.assert_close(found, expected)
    assert specdiff.stats(model).fallbacks == {"time differs between tokens of a row": STEPS}


@torch.no_grad()
def test_lists_of_latents_at_times_of_their_own():
    model, times, results = Forms.ListsByRow(), times_of([1.0, 0.6]), []
    condition = list(CONDITION)
    for _ in range(2):
        x = list(latents())
        for now, then in pairwise(times):
            velocities = model(x, now, condition)
            x = [a + step * v for a, step, v in zip(x, then - now, velocities, strict=True)]
        results.append(torch.stack(x))
        specdiff.attach(model)
    stats = specdiff.stats(model)
    assert stats.skipped >= STEPS - DENSE - 1 and not stats.fallbacks
    expected, found = results
    assert ((found - expected).norm() / expected.norm()).item() < 2e-3


@torch.no_grad()
def test_rows_at_times_of_their_own_with_conditions_made_anew():
    model, times, results = Denoiser(), times_of([1.0, 0.6]), []
    for _ in range(2):
        latent = latents()
        for now, then in pairwise(times):
            latent = latent + (then - now).reshape(-1, 1, 1) * model(latent, now, CONDITION.clone())
        results.append(latent)
        specdiff.attach(model)
    stats = specdiff.stats(model)
    assert stats.skipped >= STEPS - DENSE - 2 and not stats.fallbacks
    expected, found = results
    assert ((found - expected).norm() / expected.norm()).item() < 2e-3
