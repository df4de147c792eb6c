"""`target="solution"` in the runtime: closer to the solution, by the sampler's own steps."""

import itertools

import pytest
import torch
from torch import nn

import specdiff
from specdiff.plan import Plan
from specdiff.runtime.sampler.noise import usual_tables
from specdiff.runtime.step import integrator
from tests.runtime.toy import Euler, dense_velocity, noise, prompt, sigmas, toy

STEPS = 20
SKIPPING = Plan.of(STEPS, (0, 2, 4, 7, 10, 13, 15, 17, 19))


def solved(model):
    """By Heun's method at 200 steps."""
    latent, text, times = noise(), prompt(), sigmas(200)
    for here, there in itertools.pairwise(times):
        slope = dense_velocity(model, latent, torch.tensor([here]), text)
        ahead = latent + (there - here) * slope
        other = dense_velocity(model, ahead, torch.tensor([there]), text)
        latent = latent + (there - here) / 2 * (slope + other)
    return latent


def drawn(model, **kwargs):
    run = Euler(model, steps=STEPS, **kwargs)
    for _ in range(STEPS):
        run.step()
    return run.latent


def far(one, other):
    return (one - other).norm().item()


@pytest.mark.parametrize("plan", [Plan.every(1), SKIPPING], ids=["all", "nine"])
@pytest.mark.parametrize("target", ["dense", "solution"])
def test_closer_than_all_steps_of_euler(plan, target, caplog):
    model = toy(plan=plan, target=target)
    found, euler = far(drawn(model), solved(model)), far(drawn(toy(quality="dense")), solved(model))
    assert found < euler / 4 if target == "solution" else found > euler * 0.9
    assert not caplog.messages


def test_with_every_step_computed_it_costs_nothing():
    """Each evaluation is one run of the model's own program: as many as of a dense run."""
    model = toy(plan=Plan.every(1), target="solution")
    drawn(model)
    assert model.runtime.programs.names() == ["probe"] * STEPS


def test_a_session_that_gives_the_times_leads_there_too():
    model = toy(plan=SKIPPING, target="solution")
    read = drawn(model)
    with specdiff.session(model, timesteps=sigmas(STEPS)[:-1]):
        told = drawn(model)
    assert far(told, solved(model)) < 1.5 * far(read, solved(model))


def adams(model):
    """A multistep sampler of order two."""
    latent, text, before = noise(), prompt(), None
    for index, (here, there) in enumerate(itertools.pairwise(sigmas(STEPS))):
        now = model(latent, torch.tensor([here]), text)
        ratio = 0.0 if before is None else (there - here) / (here - sigmas(STEPS)[index - 1])
        latent = latent + (there - here) * (
            now + ratio / 2 * (now - (now if before is None else before))
        )
        before = now
    return latent


@pytest.mark.parametrize("told", [False, True])
def test_multistep_samplers_are_left_alone(told, caplog):
    model = toy(plan=Plan.every(1), target="solution")
    times = sigmas(STEPS)[:-1] if told else None
    with specdiff.session(model, timesteps=times):
        found = adams(model)
    exact = adams(toy(quality="dense"))
    assert far(found, exact) < far(drawn(toy(quality="dense")), exact) / 2  # until it shows
    assert caplog.messages == [integrator.AS_DENSE + integrator.OTHER_ORDER]


def rounded(model, steps=STEPS):
    run = Euler(model, steps=steps, dtype=torch.bfloat16)
    return run.run().latent


def test_rounded_times_are_learned_in_the_first_run(caplog):
    model, dense = toy(plan=SKIPPING, target="solution"), toy(plan=SKIPPING)
    first, second, third = (rounded(model) for _ in range(3))
    assert torch.equal(first, rounded(dense))
    assert caplog.messages == [integrator.AS_DENSE + integrator.ROUNDED.format(dtype="bfloat16")]
    exact = solved(model)
    assert far(second, exact) < far(first, exact) / 3
    assert torch.equal(second, third)


def test_what_was_learned_is_of_runs_of_as_many_steps():
    model, dense = toy(plan=Plan.every(2), target="solution"), toy(plan=Plan.every(2))
    rounded(model)
    assert torch.equal(rounded(model, steps=14), rounded(dense, steps=14))
    assert not torch.equal(rounded(model, steps=14), rounded(dense, steps=14))
    assert not torch.equal(rounded(model), rounded(dense))


def test_selecting_plans_are_as_with_dense(caplog):
    settings = {"plan": SKIPPING, "cache_ratio": 0.5}
    runs = [drawn(toy(target=target, **settings)) for target in ("dense", "solution")]
    assert torch.equal(*runs)
    assert caplog.messages == [integrator.AS_DENSE + integrator.SELECTS]


class Noise(nn.Module):
    """The exact noise, or v, of Gaussian data."""

    def __init__(self, kind):
        super().__init__()
        self.mean = nn.Parameter(torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8))
        self.kind = kind

    def forward(self, hidden_states, timestep):
        signal, noise = levels(timestep)
        found = noise * (hidden_states - signal * self.mean) / (0.09 * signal**2 + noise**2)
        if self.kind == "epsilon":
            return found
        return (found - noise * hidden_states) / signal


def levels(time):
    abar = torch.tensor((*usual_tables()[0], 1.0))[time.long()].double()
    return abar.sqrt().float(), (1 - abar).sqrt().float()


def ddim(model, kind):
    """DDIM from 800 to 0."""
    latent = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for here, there in itertools.pairwise(range(800, -1, -50)):
        times = torch.tensor([here]), torch.tensor([there])
        found, (signal, noise), (after, left) = model(latent, times[0]), *map(levels, times)
        if kind == "v":
            found = signal * found + noise * latent
        latent = after * (latent - noise * found) / signal + left * found
    return latent


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_ddim_is_led_by_its_noise_and_not_by_v(kind, caplog):
    start = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model, ends = Noise(kind), {}
    mean, (signal, noise), (after, left) = model.mean, *(levels(torch.tensor(t)) for t in (800, 0))
    spread = [(0.09 * a**2 + b**2).sqrt() for a, b in ((signal, noise), (after, left))]
    exact = after * mean + spread[1] / spread[0] * (start - signal * mean)
    for target in ("dense", "solution"):
        specdiff.attach(model, target=target, plan=Plan.every(1), prediction=kind)
        with torch.no_grad():
            ends[target] = far(ddim(model, kind), exact)
    if kind == "epsilon":
        assert ends["solution"] < ends["dense"] / 3
        assert not caplog.messages
    else:
        assert ends["solution"] == ends["dense"]
        assert caplog.messages == [integrator.AS_DENSE + integrator.NO_CLOCK]


@pytest.mark.parametrize("given", [False, True])
def test_a_last_evaluation_at_the_end_itself_is_the_models_own(given):
    """As with DDIM's leading times, whose last one is 0."""
    model = Noise("epsilon")
    times = list(range(800, -1, -50))
    specdiff.attach(model, target="solution", plan=Plan.every(1), prediction="epsilon")
    session = specdiff.session(model, timesteps=times if given else None)
    with torch.no_grad(), session:
        latent = ddim(model, "epsilon")
        last = model(latent, torch.tensor([0]))
    specdiff.detach(model)
    assert last.isfinite().all()
    torch.testing.assert_close(last, model(latent, torch.tensor([0])))
