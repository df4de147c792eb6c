"""Rivals of higher order, on a Gaussian whose solution is known."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from specdiff.evaluation.solvers import EVALUATIONS, HEUN, SOLVERS, solvers

MEAN, DEVIATION = 0.5, 0.3
START = torch.linspace(-2, 2, 50).reshape(1, 1, 1, 50)
EULER = FlowMatchEulerDiscreteScheduler(shift=3.0)


def drawn(scheduler: object, steps: int, sigmas: list[float] | None = None) -> tuple[Tensor, int]:
    """The end, and how many evaluations that took."""
    if sigmas is None:
        scheduler.set_timesteps(steps)  # type: ignore[attr-defined]
    else:
        scheduler.set_timesteps(sigmas=sigmas, device="cpu", mu=0.5)  # type: ignore[attr-defined]
    x, times = START, scheduler.timesteps  # type: ignore[attr-defined]
    for time in times:
        sigma = time / 1000
        spread = (1 - sigma) ** 2 * DEVIATION**2 + sigma**2
        apart = (x - (1 - sigma) * MEAN) / spread
        velocity = (sigma - (1 - sigma) * DEVIATION**2) * apart - MEAN
        x = scheduler.step(velocity, time, x, return_dict=False)[0]  # type: ignore[attr-defined]
    return x, len(times)


def error(found: Tensor) -> float:
    return (found - (MEAN + DEVIATION * torch.linspace(-2, 2, 50))).abs().mean().item()


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_is_closer_than_euler_at_as_many_evaluations(name: str) -> None:
    steps = 15 if name != HEUN else 8
    found, evaluations = drawn(SOLVERS[name](EULER), steps)
    assert evaluations == 15
    assert error(found) < 0.8 * error(drawn(EULER, 15)[0])


@pytest.mark.parametrize("name", SOLVERS)
def test_pipelines_may_hand_over_sigmas(name: str) -> None:
    scheduler = SOLVERS[name](EULER)
    found, _ = drawn(scheduler, 28, [1 - i / 28 for i in range(28)])
    assert error(found) < 0.02


def test_names_say_the_steps() -> None:
    found = {one.name for one in solvers()}
    assert len(found) == len(SOLVERS) * len(EVALUATIONS)
    assert {"Heun, 8 steps", "DEIS, 15 steps"} < found
