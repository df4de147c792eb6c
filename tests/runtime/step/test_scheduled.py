"""Generations whose scheduler is at hand: times, plan and weights are known from the start."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import specdiff
from specdiff.plan import Plan
from specdiff.runtime.step.clean import ANEW, TIMED
from specdiff.runtime.step.scheduled import UNUSED
from specdiff.runtime.step.step import UNEVEN
from specdiff.settings import QUALITIES
from tests.runtime.toy import CHANNELS, SIDE, TEXT, WIDTH, Toy, dense_velocity, toy

BALANCED = QUALITIES["balanced"]
COUNT = len(BALANCED.dense)


class Solver:
    """Adams-Bashforth of order two along a flow, as diffusers has its schedulers."""

    def __init__(self, shift: float = 3.0) -> None:
        self.shift = shift
        self.timesteps = torch.empty(0)

    def set_timesteps(self, steps: int) -> None:
        even = torch.linspace(1, 0, steps + 1)
        self.sigmas = self.shift * even / (1 + (self.shift - 1) * even)
        self.timesteps, self.step_index, self.before = self.sigmas[:-1], None, None

    def step(self, prediction: Tensor, time: Tensor, latent: Tensor, return_dict: bool) -> Any:
        index = self.step_index or 0
        here, there = self.sigmas[index : index + 2]
        mean = prediction
        if self.before is not None:
            bend = (there - here) / (here - self.sigmas[index - 1]) / 2
            mean = prediction + bend * (prediction - self.before)
        self.step_index, self.before = index + 1, prediction
        return (latent + (there - here) * mean,)


Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def drawn(velocity: Velocity, steps_with: Any, steps: int = 28, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(1, CHANNELS, SIDE, SIDE, generator=generator)
    prompt = torch.randn(1, TEXT, WIDTH, generator=generator)
    steps_with.set_timesteps(steps)
    unit = 1000 if float(steps_with.timesteps[0]) > 1.5 else 1
    with torch.no_grad():
        for time in steps_with.timesteps:
            found = velocity(latent, time.reshape(1).float() / unit, prompt)
            latent = steps_with.step(found, time, latent, return_dict=False)[0]
    return latent


def dense(model: Toy, steps_with: Any, steps: int = 28, seed: int = 0) -> Tensor:
    return drawn(lambda *inputs: dense_velocity(model, *inputs), steps_with, steps, seed)


def error(model: Toy, steps_with: Any, exact: Tensor, **known: Any) -> float:
    specdiff.reset(model)
    specdiff.configure(model, **known)
    return float(torch.dist(drawn(model, steps_with), exact))


def new(**options: Any) -> Toy:
    model = toy(**options)
    specdiff.configure(model)
    return model


@pytest.mark.parametrize("way", ["model", "session"])
def test_forecasts_of_a_multistep_sampler_are_made_good(way: str) -> None:
    model, solver = new(), Solver()
    exact = dense(model, solver)
    without = error(model, solver, exact)
    specdiff.reset(model)
    if way == "model":
        known = error(model, solver, exact, scheduler=solver)
    else:
        with specdiff.session(model, scheduler=solver):
            known = float(torch.dist(drawn(model, solver), exact))
    assert known < without / 2
    assert specdiff.stats(model).dense == COUNT
    assert not specdiff.stats(model).fallbacks
    assert solver.step_index == 28


def test_another_scheduler_than_the_one_given(caplog: pytest.LogCaptureFixture) -> None:
    model, solver, other = new(), Solver(), Solver(shift=7.0)
    exact = dense(model, solver)
    without = error(model, solver, exact)
    other.set_timesteps(20)
    assert error(model, solver, exact, scheduler=other) == pytest.approx(without, rel=0.1)
    assert UNUSED[:40] in caplog.text
    assert error(model, solver, exact, scheduler=None) == without


@pytest.mark.parametrize("known", ["scheduler", "times"])
def test_few_steps_are_dense_to_the_bit_unless_a_plan_is_given(known: str) -> None:
    model, solver = new(), Solver()
    exact = dense(model, solver, 8)

    def found(steps: int = 8) -> Tensor:
        solver.set_timesteps(steps)
        how = {"scheduler": solver} if known == "scheduler" else {"timesteps": solver.timesteps}
        with specdiff.session(model, **how):
            return drawn(model, solver, steps)

    assert torch.equal(found(), exact)
    assert specdiff.stats(model).dense == 8
    specdiff.configure(model, plan=Plan.every(2))
    assert not torch.equal(found(), exact)
    specdiff.configure(model, plan=None)
    specdiff.reset(model)
    found(9)
    assert specdiff.stats(model).skipped


@pytest.mark.parametrize(
    ("name", "options", "steps", "computed"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_karras_sigmas": True}, 28, COUNT),
        (
            "FlowMatchEulerDiscreteScheduler",
            {"shift": 3.0, "use_exponential_sigmas": True},
            28,
            COUNT,
        ),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_karras_sigmas": True}, 50, COUNT),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_beta_sigmas": True}, 28, COUNT),
        ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, 28, 2 * COUNT + 1),
    ],
)
def test_each_schedule_has_the_dense_steps_of_the_preset(
    name: str, options: dict[str, Any], steps: int, computed: int
) -> None:
    model = new(plan=BALANCED)
    scheduler = getattr(pytest.importorskip("diffusers"), name)(**options)
    specdiff.configure(model, scheduler=scheduler)
    drawn(model, scheduler, steps)
    assert specdiff.stats(model).dense == computed
    assert not specdiff.stats(model).fallbacks


@pytest.mark.parametrize("spaced", ["karras", "exponential", "beta"])
def test_uneven_times_that_nobody_gave(spaced: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nearly as good as where they are known, and it is said what makes them so."""
    diffusers = pytest.importorskip("diffusers")
    model, known = new(plan=BALANCED), {f"use_{spaced}_sigmas": True}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **known)
    exact, fewer = dense(model, scheduler), dense(model, scheduler, 11)
    assert error(model, scheduler, exact) < torch.dist(fewer, exact) / 4
    assert COUNT <= specdiff.stats(model).dense <= COUNT + 2
    assert caplog.text.count(UNEVEN) == 1
    error(model, scheduler, exact, scheduler=scheduler)
    assert caplog.text.count(UNEVEN) == 1


def between(model: Toy, solver: Solver) -> Sequence[Callable[[], object]]:
    """What may run between two generations."""

    def cut_short() -> None:
        for _ in zip(range(5), [drawn(model, solver, 6, seed=4)], strict=False):
            pass
        solver.set_timesteps(28)
        generator = torch.Generator().manual_seed(9)
        latent = torch.randn(1, CHANNELS, SIDE, SIDE, generator=generator)
        prompt = torch.randn(1, TEXT, WIDTH, generator=generator)
        for time in itertools.islice(solver.timesteps, 5):
            model(latent, time.reshape(1), prompt)

    def in_session() -> None:
        with specdiff.session(model, quality="fast"):
            drawn(model, solver, 20, seed=2)

    def noise() -> None:
        seeded(lambda: drawn(model, Noisy(), 12, seed=8))

    def in_turns() -> None:
        def of_both(latent: Tensor, time: Tensor, prompt: Tensor) -> Tensor:
            model(-latent, time, 2 * prompt)
            return model(latent, time, prompt)

        drawn(of_both, Solver(), seed=6)

    def switched_off() -> None:
        specdiff.configure(model, quality="dense")
        drawn(model, solver, seed=3)
        specdiff.configure(model, quality=None)

    return (
        cut_short,
        in_session,
        noise,
        in_turns,
        switched_off,
        lambda: drawn(model, solver, 50, seed=5),
    )


@pytest.mark.parametrize("known", [True, False])
def test_one_seed_gives_the_same_bits_whatever_ran_between(known: bool) -> None:
    model, solver = new(), Solver()
    if known:
        specdiff.configure(model, scheduler=solver)
    first = drawn(model, solver)
    for run in between(model, solver):
        run()
        assert torch.equal(drawn(model, solver), first), run.__name__
    for _ in range(95):
        drawn(model, solver, 1, seed=7)
    assert torch.equal(drawn(model, solver), first)


class Noisy(Solver):
    """Euler along a flow, with a share of the noise drawn anew at each step."""

    def __init__(self, share: float = 0.5) -> None:
        super().__init__()
        self.share = share

    def step(self, prediction: Tensor, time: Tensor, latent: Tensor, return_dict: bool) -> Any:
        index = self.step_index or 0
        here, there = self.sigmas[index : index + 2]
        self.step_index = index + 1
        clean, noise = latent - here * prediction, latent + (1 - here) * prediction
        kept = (1 - self.share**2) ** 0.5
        mixed = kept * noise + self.share * torch.randn_like(noise)
        return ((1 - there) * clean + there * mixed,)


def seeded(draw: Callable[[], Tensor]) -> Tensor:
    torch.manual_seed(0)
    return draw()


def test_a_sampler_that_draws_noise_is_accelerated() -> None:
    model, solver = new(), Noisy()
    exact = seeded(lambda: dense(model, solver))
    fewer = seeded(lambda: dense(model, solver, 10))
    specdiff.configure(model, scheduler=solver)
    found = seeded(lambda: drawn(model, solver))
    stats = specdiff.stats(model)
    assert (stats.dense, stats.fallbacks) == (COUNT, {})
    assert torch.dist(found, exact) < torch.dist(fewer, exact) / 2


def test_noise_that_the_scheduler_does_not_draw_is_none_of_its() -> None:
    model, solver = new(), Noisy()
    specdiff.configure(model, scheduler=solver)

    def disturbed(latent: Tensor, time: Tensor, prompt: Tensor) -> Tensor:
        return model(latent + 0.5 * torch.randn_like(latent), time, prompt)

    seeded(lambda: drawn(disturbed, solver))
    assert specdiff.stats(model).fallbacks["unexplained step"] > 10


@pytest.mark.parametrize(("share", "times", "why"), [(1.0, False, ANEW), (0.5, True, TIMED)])
def test_noise_that_runs_dense(share: float, times: bool, why: str) -> None:
    model, solver = new(), Noisy(share)
    exact = seeded(lambda: dense(model, solver))
    solver.set_timesteps(28)
    known = {"timesteps": solver.timesteps} if times else {}
    with specdiff.session(model, scheduler=solver, **known):
        assert torch.equal(seeded(lambda: drawn(model, solver)), exact)
    assert specdiff.stats(model).fallbacks == {why: 28 - COUNT}


@pytest.mark.parametrize("known", [True, False])
def test_two_experts_have_half_of_a_trajectory_each(known: bool) -> None:
    """As Wan 2.2: two models, each with a part of the plan of its own."""
    diffusers = pytest.importorskip("diffusers")
    experts, scheduler = (new(), new()), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    for model in experts:
        specdiff.configure(model, scheduler=scheduler if known else None)

    def by(models: Sequence[Velocity]) -> Velocity:
        return lambda latent, time, prompt: models[float(time) < 0.75](latent, time, prompt)

    plain = by([functools.partial(dense_velocity, model) for model in experts])
    exact, found = drawn(plain, scheduler), drawn(by(experts), scheduler)
    stats = [specdiff.stats(model) for model in experts]
    assert all(each.skipped >= 4 for each in stats)
    computed = sum(each.dense for each in stats)
    assert COUNT <= computed <= COUNT + 5
    assert torch.dist(found, exact) < torch.dist(drawn(plain, scheduler, computed), exact)
