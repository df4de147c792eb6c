"""Correction: what forecasts cost the latent is made good, and nothing else changes."""

import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

import specdiff as sd
from specdiff.options import Options
from specdiff.plan import Plan
from specdiff.program import Evaluation
from specdiff.runtime.sampler.timeline import next_time
from specdiff.runtime.step.corrector import ONE_HALF
from specdiff.runtime.step.dispatch import Runtime
from specdiff.runtime.tokens.correction import Correction, on_top
from specdiff.runtime.tokens.history import ComputedOutput
from specdiff.runtime.tokens.schedule import Place, Schedule
from tests.runtime.toy import (
    CHANNELS,
    UNCORRECTED,
    Euler,
    N,
    Toy,
    ToyPrograms,
    noise,
    prompt,
    sigmas,
    streams_of,
    toy,
)

CORRECTED = {True: {}, False: UNCORRECTED}
SKIPPING = {
    "plan": Plan.every(3, warmup=2),
    "cache_ratio": 1.0,
    "forecast": "reuse",
}
SELECTING = {"plan": Plan.every(4, warmup=2, lookahead=0), "cache_ratio": 0.5, "forecast": "reuse"}


class LineOfTime(ToyPrograms):
    """Its prediction is a line in time, whatever the latent."""

    def _run(self, inputs, caches, active):
        found = super()._run(inputs, caches, active)
        generator = torch.Generator().manual_seed(5)
        level, rise = torch.randn(2, 1, N, CHANNELS, generator=generator)
        sigma = inputs[6].float().reshape(-1, 1, 1) / self.unit
        line = self.sign * (level + rise * sigma)
        if active is not None:
            line = line.gather(1, active.unsqueeze(-1).expand(-1, -1, CHANNELS))
        return Evaluation(line, found.importance)


class ParabolaOfTime(LineOfTime):
    """Its prediction bends, too."""

    def _run(self, inputs, caches, active):
        found = super()._run(inputs, caches, active)
        bend = torch.randn(1, N, CHANNELS, generator=torch.Generator().manual_seed(6))
        if active is not None:
            bend = bend.gather(1, active.unsqueeze(-1).expand(-1, -1, CHANNELS))
        sigma = inputs[6].float().reshape(-1, 1, 1) / self.unit
        return Evaluation(found.tokens + self.sign * bend * sigma**2, found.importance)


def follow(options, programs=None, *, session=True, steps=13, as_time=lambda s: s):
    """The latents of a run on a line, and of a dense one, before each evaluation."""
    latents = []
    for chosen in (options, {"cache_ratio": 0.0}):
        model = toy(programs=programs or LineOfTime(), **chosen)
        run = Euler(model, steps=steps, as_time=as_time)
        times = [as_time(s) for s in run.sigmas[:-1]] if session else None
        seen = []
        with sd.session(model, timesteps=times):
            for _ in range(steps):
                seen.append(run.latent)
                run.step()
        latents.append(torch.stack([*seen, run.latent]))
    return latents


def errors(latents):
    actual, expected = latents
    return (actual - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)


DENSE = (0, 1, 4, 7, 10)


@pytest.mark.parametrize(("sign", "unit"), [(1.0, 1.0), (-1.0, 1.0), (1.0, 1000.0)])
def test_a_line_in_time_is_followed_exactly(sign, unit):
    """After each dense evaluation the latent is where a dense run has it."""
    options = SKIPPING
    programs = LineOfTime(sign=sign, unit=unit)
    found = errors(follow(options, programs, as_time=lambda s: s * unit))
    assert max(found[index + 1] for index in DENSE) < 1e-5
    without = errors(follow({**options, **UNCORRECTED}, programs, as_time=lambda s: s * unit))
    assert min(without[index + 1] for index in DENSE[2:]) > 1e-3


def test_a_parabola_in_time_is_followed_from_the_third_computed_output_on():
    found = errors(follow(SKIPPING, ParabolaOfTime()))
    # what the first gap, of the two outputs known then, was short of stays
    short = found[DENSE[1] + 1]
    assert all(abs(found[index + 1] - short) < 1e-5 for index in DENSE[2:])
    without = errors(follow({**SKIPPING, **UNCORRECTED}, ParabolaOfTime()))
    assert min(without[index + 1] for index in DENSE[2:]) > 1e-3


def test_tokens_are_corrected_when_they_are_computed():
    found = errors(follow(SELECTING))
    assert max(found[index + 1] for index in (5, 9)) < 1e-5
    without = errors(follow({**SELECTING, **UNCORRECTED}))
    assert min(without[index + 1] for index in (5, 9)) > 1e-3
    assert found.sum() < without.sum()


def test_unknown_times_are_guessed_and_the_rest_made_good_later():
    found = errors(follow(SKIPPING, session=False, steps=28))
    without = errors(follow({**SKIPPING, **UNCORRECTED}, session=False, steps=28))
    dense = range(7, 28, 3)
    assert max(found[index + 1] / without[index + 1] for index in dense) < 0.1


@pytest.mark.parametrize("steps", [10, 28, 50])
@pytest.mark.parametrize("round_to", [torch.float32, torch.bfloat16])
def test_next_time_is_guessed_and_the_last_evaluation_known(steps, round_to):
    times = sigmas(steps)
    seen = torch.tensor(times[:-1], dtype=round_to).tolist()
    for index in range(6, steps):
        step = times[index + 1] - times[index]
        guess = next_time(seen[: index + 1], None)
        assert abs(guess - times[index + 1]) < (0.25 if round_to == torch.float32 else 0.6) * abs(
            step
        )
        assert (guess == 0) == (index == steps - 1)
        assert next_time(times[: index + 1], times[:-1]) == times[index + 1]


def test_no_sync_and_nothing_left_where_all_is_dense():
    model = toy(cache_ratio=0.0)
    Euler(model).run()
    (stream,) = streams_of(model)
    assert stream.fit.correction is None and stream.fit.sampler is None


def test_a_parabola_is_followed_where_the_sampler_keeps_a_share_of_the_latent():
    """A sampler such as DDIM: x' = a x + b p, with a other than 1."""
    generator = torch.Generator().manual_seed(7)
    level, rise, bend = torch.randn(3, 1, N, CHANNELS, generator=generator)
    kept, moved = (0.6 + 0.3 * torch.rand(2, 13, generator=generator)).tolist()
    actual = exact = torch.zeros(1, N, CHANNELS)
    correction, computed = None, ()
    for index in range(13):
        if correction:
            correction.settle(kept[index - 1], moved[index - 1])
        time = 1 - index / 13
        prediction = level + rise * time + bend * time**2
        handed = computed[0].tokens if computed else prediction
        if index in DENSE:
            before, newest = computed, ComputedOutput(torch.full((1, N), time), prediction)
            computed, handed = (newest, *before)[:3], prediction
            if correction:
                missing = correction.collect(before[0], [*before[1:], None][0], newest)
                handed = prediction + on_top(missing, kept[index], moved[index])
        correction = correction or Correction.none(computed[0])
        correction.hand_out(computed[0], handed, time)
        exact = kept[index] * exact + moved[index] * prediction
        actual = kept[index] * actual + moved[index] * handed
        if index in DENSE:
            torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-5)


def test_switched_off_and_on_again_it_knows_nothing_of_before():
    """What was withheld before says nothing of the steps that follow."""
    handed = []
    for on in ({0, 1, 2, 3, 4, 5}, {0, 1}):  # two, for the sampler to show itself
        model = toy(programs=LineOfTime(), **SKIPPING)
        run = Euler(model, steps=13)
        with sd.session(model, timesteps=run.sigmas[:-1]):
            for index in range(13):
                sd.configure(model, ablation={"correction": index in on or index >= 8})
                run.step()
        handed.append(run.velocities[10])
    torch.testing.assert_close(*handed, rtol=0, atol=1e-6)


def test_solvers_that_use_predictions_again_are_left_alone():
    """Adams-Bashforth: from the third dense evaluation on it is known for what it is."""
    model = toy(**{**SKIPPING, "forecast": "linear"})
    run, handed = Euler(model, steps=13), []
    for index in range(13):
        latent = run.latent
        handed.append(run.step())
        if index:
            span = run.sigmas[index + 1] - run.sigmas[index]
            run.latent = latent + span * (1.5 * handed[-1] - 0.5 * handed[-2])
    assert max(run.errors[index] for index in DENSE[3:]) < 1e-6
    assert sd.stats(model).fallbacks == {}


@pytest.mark.parametrize("why", ["paper", "not additive"])
def test_where_it_does_not_apply_dense_evaluations_are_the_model(why):
    programs = ToyPrograms()
    if why == "not additive":
        object.__setattr__(programs.signature, "additive", False)
    options = {**SKIPPING, "plan": Plan.every(3, warmup=2, lookahead=0)}
    if why == "paper":
        options["method"] = "paper"
    model = Toy(Runtime(programs, Options(**options)))
    run = Euler(model, seed=3, steps=13)
    run.run()
    assert max(run.errors[index] for index in DENSE) < 1e-6
    assert sd.stats(model).skipped


def test_plan_of_default_options():
    model = toy(cache_ratio=1.0)
    Euler(model, steps=28, text=prompt()).run()
    counts = sd.stats(model)
    assert (counts.dense, counts.skipped) == (11, 17)


@pytest.mark.parametrize(
    ("options", "dense"),
    [
        ({}, [0, 1, 2, 4, 7, 10, 14, 18, 22, 26, 27]),
        ({"plan": Plan.tapered(3)}, [0, 2, 4, 6, 9, 12, 15, 18, 21, 24, 26, 27]),
        ({"plan": Plan.tapered(8)}, [0, 2, 5, 9, 15, 23, 26, 27]),
        ({"plan": Plan.tapered(4, warmup=3)}, [0, 1, 2, 4, 7, 10, 14, 18, 22, 26, 27]),
        ({"plan": Plan.every(4)}, [0, 4, 8, 12, 16, 20, 24]),
        ({"plan": Plan.warmup(1)}, [0]),
    ],
)
def test_dense_evaluations_of_a_plan(options, dense):
    plan = Schedule.of(Options(**options).resolve(), (16,))
    assert [i for i in range(28) if plan.decide(Place.known(i, 28))[0]] == dense


def guided_apart(options, scale, scheduler=None, texts=(1, 2), held=0, given=False):
    """The final latent of a run with a call for each half of guidance, and the model.

    The first rows of it may be held, as image to video holds its first frame; a session may be
    given the times.
    """
    model, latent = toy(programs=ToyPrograms(unit=1000.0), **options), noise()
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(28)
    conditional, without = (prompt(seed) for seed in texts)
    first = latent[:, :, :held]
    with sd.session(model, timesteps=scheduler.timesteps.tolist() if given else None):
        for time in scheduler.timesteps:
            at = time.float().expand(1)
            halves = [model(latent, at, text) for text in (conditional, without)]
            velocity = torch.lerp(halves[1], halves[0], scale)
            latent = scheduler.step(velocity, time, latent, return_dict=False)[0]
            latent = torch.cat([first, latent[:, :, held:]], dim=2)
    return latent, model


@pytest.mark.parametrize(("scale", "held"), [(1.5, 0), (4.0, 0), (7.0, 0), (3.0, 1)])
def test_halves_of_guidance_in_calls_of_their_own_are_corrected(scale, held):
    expected, _ = guided_apart({"cache_ratio": 0.0}, scale, held=held)
    short = [
        (guided_apart(CORRECTED[on], scale, held=held)[0] - expected).norm() / expected.norm()
        for on in (True, False)
    ]
    assert short[0] < 0.4 * short[1]
    assert short[0] < 0.01


@pytest.mark.parametrize("held", [0, 1])
@pytest.mark.parametrize("scale", [3.0, 7.0])
@pytest.mark.parametrize("solver", [FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler])
def test_halves_are_left_alone_where_times_are_given(solver, scale, held, caplog):
    """Each sees a part of the sampler's step; no other half is looked for, nor the step's order."""
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    settings = flow if solver is UniPCMultistepScheduler else {"shift": 3.0}
    found = [
        guided_apart(CORRECTED[on], scale, solver(**settings), held=held, given=True)[0]
        for on in (True, False)
    ]
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert ONE_HALF in caplog.text


@pytest.mark.parametrize("scale", [1.5, 7.0])
@pytest.mark.parametrize(
    "solver",
    [
        UniPCMultistepScheduler,
        DPMSolverMultistepScheduler,
        DEISMultistepScheduler,
        FlowMatchHeunDiscreteScheduler,
    ],
)
def test_halves_that_a_solver_uses_again_are_left_alone(solver, scale):
    """Not a single correction is handed out: Wan's pipeline, with UniPC, once lost by it."""
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    settings = {"shift": 3.0} if solver is FlowMatchHeunDiscreteScheduler else flow
    found = [guided_apart(CORRECTED[on], scale, solver(**settings))[0] for on in (True, False)]
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_halves_are_known_by_their_latent():
    _, model = guided_apart({}, 7.0)
    assert all(stream.joint is not None and stream.fit.proven for stream in streams_of(model))
    model = toy()
    runs = [Euler(model, seed, steps=28) for seed in (3, 4)]
    for _ in range(28):
        for run in runs:
            run.step()
    assert all(stream.joint is None for stream in streams_of(model))


def test_two_generations_from_one_seed_are_corrected_as_if_alone():
    model = toy()
    runs = [Euler(model, 3, steps=28, text=prompt(text)) for text in (5, 6)]
    for _ in range(28):
        for run in runs:
            run.step()
    for run, text in zip(runs, (5, 6), strict=True):
        alone = Euler(toy(), 3, steps=28, text=prompt(text)).run()
        torch.testing.assert_close(run.latent, alone.latent, rtol=1e-4, atol=1e-5)


def test_a_half_that_is_called_no_more_is_not_waited_for():
    """Guidance in the first part of a run only."""
    short = []
    for on in (True, False):
        latents = []
        for options in (CORRECTED[on], {"cache_ratio": 0.0}):
            model, latent, at = toy(**options), noise(), sigmas(28)
            given, without = prompt(1), prompt(2)
            for index in range(28):
                time = torch.tensor(at[index]).expand(1)
                velocity = model(latent, time, given)
                if index < 15:
                    velocity = torch.lerp(model(latent, time, without), velocity, 4.0)
                latent = latent + (at[index + 1] - at[index]) * velocity
            latents.append(latent)
        short.append((latents[0] - latents[1]).norm())
    assert short[0] < 0.5 * short[1]
