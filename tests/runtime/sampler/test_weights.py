"""A sampler's weights over a run, by hand and of diffusers' schedulers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from specdiff.errors import OptionError
from specdiff.runtime.sampler import scheduler as scheduler_module
from specdiff.runtime.sampler.scheduler import Run, Scheduler
from specdiff.runtime.sampler.weights import Weights, axis

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
LINEAR = [
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("FlowMatchHeunDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", FLOW),
    ("DPMSolverMultistepScheduler", {**FLOW, "solver_order": 3}),
    ("DPMSolverSinglestepScheduler", FLOW),
    ("UniPCMultistepScheduler", {**FLOW, "solver_order": 3}),
    ("DEISMultistepScheduler", FLOW),
    ("DDIMScheduler", {"clip_sample": False}),
    ("PNDMScheduler", {}),
    ("IPNDMScheduler", {}),
    ("EulerDiscreteScheduler", {}),
    ("LMSDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
]
REFUSED = [
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "draw noise"),
    ("FlowMatchLCMScheduler", {}, "draw noise"),
    ("DPMSolverMultistepScheduler", {**FLOW, "algorithm_type": "sde-dpmsolver++"}, "draw noise"),
    ("DDPMScheduler", {"clip_sample": False}, "draw noise"),
    ("DDIMScheduler", {"clip_sample": True}, "no sums"),
    ("CogVideoXDPMScheduler", {}, "does not step by itself"),
]


def made(name: str, options: dict[str, Any], steps: int = 8) -> Any:
    scheduler = getattr(pytest.importorskip("diffusers"), name)(**options)
    scheduler.set_timesteps(steps)
    return scheduler


def run_of(scheduler: Any, time: float | None = None) -> Run:
    found = Scheduler(scheduler).run(float(scheduler.timesteps[0]) if time is None else time)
    assert isinstance(found, Run), found
    return found


@pytest.mark.parametrize(("name", "options"), LINEAR)
def test_latents_are_the_sums_that_the_weights_say(name: str, options: dict[str, Any]) -> None:
    scheduler = made(name, options)
    before, state = copy.deepcopy(vars(scheduler)), torch.get_rng_state()
    run = run_of(scheduler)
    assert str(vars(scheduler)) == str(before)
    assert torch.equal(torch.get_rng_state(), state)
    assert run.times == tuple(scheduler.timesteps.tolist())
    assert run.weights is not None, run.why_not
    count = len(scheduler.timesteps)
    first, predictions = torch.randn(2, 3), torch.randn(count, 2, 3)
    ends = []
    for change in (torch.zeros(count, 2, 3), torch.randn(count, 2, 3)):
        latent, own = first, copy.deepcopy(scheduler)
        for time, prediction in zip(own.timesteps, predictions + change, strict=True):
            own.scale_model_input(latent, time) if hasattr(own, "scale_model_input") else None
            latent = own.step(prediction, time, latent, return_dict=False)[0]
        ends.append(latent)
    expected = torch.einsum("j,jbc->bc", run.weights.rows[-1].float(), change)
    torch.testing.assert_close(ends[1] - ends[0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "options", "why"), REFUSED)
def test_samplers_whose_latents_are_no_sums(name: str, options: dict[str, Any], why: str) -> None:
    run = run_of(made(name, options))
    assert run.weights is None
    assert why in run.why_not


def test_a_generation_that_begins_later() -> None:
    """Image to image: the first step has no earlier prediction to use."""
    scheduler = made("DPMSolverMultistepScheduler", FLOW)
    scheduler.set_begin_index(5)
    run = run_of(scheduler, float(scheduler.timesteps[5]) / 1000)
    assert run.times == pytest.approx([time / 1000 for time in scheduler.timesteps[5:].tolist()])
    assert run.first == 0
    assert run.weights is not None
    assert run.weights.evaluations == 3


def test_a_stream_that_joins_a_generation_has_its_weights() -> None:
    scheduler = made("DPMSolverMultistepScheduler", FLOW)
    known = Scheduler(scheduler)
    begun = known.run(float(scheduler.timesteps[0]))
    for time in scheduler.timesteps[:3]:
        scheduler.step(torch.zeros(1, 2), time, torch.zeros(1, 2))
    joined = known.run(float(scheduler.timesteps[3]))
    assert isinstance(begun, Run)
    assert isinstance(joined, Run)
    assert joined.weights is begun.weights
    assert joined.first == 3
    late = run_of(scheduler, float(scheduler.timesteps[3]))
    assert late.weights is None
    assert late.why_not == scheduler_module.UNDER_WAY


@pytest.mark.parametrize("form", [lambda t: t, lambda t: t / 1000, lambda t: 1 - t / 1000])
def test_times_in_the_form_that_the_model_gets(form: Any) -> None:
    scheduler = made("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
    rounded = torch.tensor(form(float(scheduler.timesteps[0]))).bfloat16().item()
    run = run_of(scheduler, rounded)
    assert run.times == pytest.approx([form(time) for time in scheduler.timesteps.tolist()])
    assert run.is_at(1, torch.tensor(form(float(scheduler.timesteps[1]))).bfloat16().item())
    assert not run.is_at(1, run.times[4])


def test_a_scheduler_that_does_not_run_the_model() -> None:
    scheduler = made("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
    assert Scheduler(scheduler).run(0.123456) == scheduler_module.ELSEWHERE
    scheduler.timesteps = None
    assert Scheduler(scheduler).run(1.0) == scheduler_module.UNSET
    with pytest.raises(OptionError, match="a dict has no method step"):
        Scheduler({})


def test_a_scheduler_whose_timesteps_are_those_of_training() -> None:
    """As it is before `set_timesteps`, where a loop has sigmas of its own."""
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert Scheduler(scheduler).run(1000.0) == scheduler_module.UNSET
    scheduler.set_timesteps(1000)
    assert isinstance(Scheduler(scheduler).run(1000.0), Run)


def test_columns_that_later_latents_count_alike() -> None:
    """Euler: every prediction moves all later latents by its own step."""
    like, steps = torch.zeros(5), (0.4, 0.3, 0.2, 0.1)
    latents = [like]
    for index, step in enumerate(steps):
        latents.append(latents[-1] + step * axis(like, index))
    weights = Weights.of(latents)
    assert weights is not None
    assert weights.due(2) == pytest.approx(steps[:3])
    assert weights.ratio(1, 0, 1) == pytest.approx(0.4 / 0.3)
    latents[3] = latents[3] + 0.5 * axis(like, 1)  # of one latent alone
    uneven = Weights.of(latents)
    assert uneven is not None
    assert uneven.ratio(1, 0, 1) is None


def test_what_no_prediction_gave_is_noise() -> None:
    assert Weights.of([torch.zeros(3), torch.tensor([0.5, 0, 0.1]), torch.zeros(3)]) is None
    assert Weights.of([torch.zeros(3), torch.tensor([torch.nan, 0, 0]), torch.zeros(3)]) is None


@pytest.mark.parametrize(
    ("name", "options", "expected"), [(*LINEAR[0], True), (*LINEAR[3], False), (*LINEAR[2], False)]
)
def test_samplers_of_first_order(name: str, options: dict[str, Any], expected: bool) -> None:
    run = run_of(made(name, options))
    assert run.weights is not None
    assert run.weights.is_first_order == expected
