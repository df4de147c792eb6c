"""What the runtime takes a sampler to be, against the schedulers of diffusers themselves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)
from torch import Tensor

import specdiff as sd
from specdiff.errors import OptionError
from specdiff.options import Options
from specdiff.runtime.sampler.displacement import Displacement, guided
from specdiff.runtime.sampler.noise import BETAS, Diffusion, Flow, processes, usual_tables
from specdiff.runtime.sampler.sampler_fit import Prediction
from tests.helpers import PLAN
from tests.runtime.test_api import NoReadback
from tests.runtime.toy import ToyPrograms, noise, prompt, toy

KINDS = {"epsilon": "epsilon", "v": "v_prediction"}
SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "dpm": (DPMSolverMultistepScheduler, {"solver_order": 1}),
    "euler": (EulerDiscreteScheduler, {"timestep_spacing": "leading"}),
    "ddpm": (DDPMScheduler, {"clip_sample": False}),
}


def scheduler(name: str, kind: str, schedule: int, steps: int = 20) -> Any:
    shape, start, end = BETAS[schedule]
    make, settings = SAMPLERS[name]
    made = make(
        prediction_type=KINDS[kind],
        beta_schedule=shape,
        beta_start=start,
        beta_end=end,
        **settings,
    )
    made.set_timesteps(steps)
    return made


def model(latent: Tensor) -> Tensor:
    """Some function of the latent that is no multiple of it."""
    return torch.tanh(2 * latent) + 0.3 * latent.roll(1, -1) + 0.1


def gaussian(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 4, 16, 16)), generator=torch.Generator().manual_seed(seed))


def one_step(made: Any, predict: Callable[[Tensor], Tensor] = model) -> tuple[Tensor, ...]:
    """What the model sees at the first two times, and what it predicts at the first."""
    torch.manual_seed(5)  # of the noise that the scheduler adds
    first, second = made.timesteps[:2]
    latent = gaussian(0) * made.init_noise_sigma
    before = made.scale_model_input(latent, first)
    predicted = predict(before)
    latent = made.step(predicted, first, latent).prev_sample
    return before, predicted, made.scale_model_input(latent, second)


def infer(
    made: Any, after: Tensor, before: Tensor, ways: list[Tensor], *, fetched: bool = True,
    prediction: str = "auto", table: Any = None,
) -> Prediction:  # fmt: skip
    seen = Displacement.of([after], [before], [(way,) for way in ways])
    if fetched:
        seen = seen.fetched(seen.products.flatten().tolist())
    start, end = made.timesteps[:2].tolist()
    candidates = processes(prediction, table)
    return Prediction.infer(seen, candidates, start, end, 1000, exact=not fetched)


def chosen(prediction: Prediction) -> tuple[Any, int]:
    ways = len(prediction.rates)
    return prediction.candidates[int(prediction.best) // ways], int(prediction.best) % ways


@pytest.mark.parametrize("fetched", [True, False])
@pytest.mark.parametrize("schedule", range(len(BETAS)))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ddim", "dpm", "euler"])
def test_the_jump_is_ddims_own_step(name, kind, schedule, fetched):
    made = scheduler(name, kind, schedule)
    before, predicted, after = one_step(made)
    prediction = infer(made, after, before, [predicted], fetched=fetched)
    assert prediction.trusted
    assert chosen(prediction) == (Diffusion(kind, usual_tables()[schedule]), 0)
    start = 900
    halfway = scheduler("ddim", kind, schedule, steps=2)  # steps of 500
    expected = halfway.step(model(after), start, after).prev_sample
    landed = prediction.jump(after, [model(after)], start, start - 500)
    torch.testing.assert_close(landed, expected, rtol=1e-4, atol=1e-5)


def test_usual_tables_are_those_of_diffusers():
    for schedule, table in enumerate(usual_tables()):
        expected = scheduler("ddim", "epsilon", schedule).alphas_cumprod
        torch.testing.assert_close(torch.tensor(table), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("wrong", ["flow", "epsilon"])
def test_a_wrong_kind_is_rejected(wrong):
    made = scheduler("ddim", "v", 0)
    before, predicted, after = one_step(made)
    assert infer(made, after, before, [predicted]).trusted
    assert not infer(made, after, before, [predicted], prediction=wrong).trusted


def test_a_flow_stays_a_flow():
    """Stable Diffusion 3: times up to 1000, sigma = t / 1000."""
    made = scheduler("ddim", "epsilon", 0)
    made.timesteps = torch.tensor([1000.0, 950.0])
    before = gaussian(0)
    after = before - 0.05 * model(before)
    prediction = infer(made, after, before, [model(before)])
    assert chosen(prediction) == (Flow(), 0)
    landed = prediction.jump(after, [model(after)], 950, 500)
    torch.testing.assert_close(landed, after - 0.45 * model(after))


@pytest.mark.parametrize("table", [lambda t: t, lambda t: t.tolist()])
def test_a_schedule_of_ones_own(table):
    made = DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    made.set_timesteps(20)
    before, predicted, after = one_step(made)
    own = Options(alphas_cumprod=table(made.alphas_cumprod)).resolve().alphas_cumprod
    prediction = infer(made, after, before, [predicted], table=own)
    assert chosen(prediction) == (Diffusion("epsilon", own), 0)
    assert prediction.residual < 1e-3
    assert infer(made, after, before, [predicted]).residual > 10 * prediction.residual


@pytest.mark.parametrize(
    "table", ["linear", 0.5, [0.9], [0.1, 0.9], [1.5, 0.5], [0.9, float("nan")], torch.rand(3, 2)]
)
def test_what_is_no_schedule_is_refused(table):
    with pytest.raises(OptionError, match="alphas_cumprod"):
        Options(alphas_cumprod=table)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_guidance_is_found_whichever_half_comes_first(name, last):
    made = scheduler(name, "epsilon", 0)

    def predict(latent: Tensor) -> Tensor:
        halves = model(latent).chunk(2)
        unconditional, conditional = halves[::-1] if last else halves
        return torch.cat([torch.lerp(unconditional, conditional, 5.0)] * 2)

    before, _, after = one_step(made, predict)
    prediction = infer(made, after, before, guided(model(before), 5.0))
    assert chosen(prediction)[1] == int(last)
    ways = guided(model(after), 5.0)
    landed = prediction.jump(after, ways, 900, 400)
    alone = prediction.candidates[int(prediction.best) // 2].jump(900, 400)
    torch.testing.assert_close(landed, alone[0] * after + alone[1] * ways[last])


@pytest.mark.parametrize("schedule", range(len(BETAS)))
@pytest.mark.parametrize("kind", KINDS)
def test_samplers_that_add_noise_are_told_from_strangers(kind, schedule):
    made = scheduler("ddpm", kind, schedule)
    before, predicted, after = one_step(made)
    prediction = infer(made, after, before, [predicted])
    assert prediction.trusted
    assert chosen(prediction) == (Diffusion(kind, usual_tables()[schedule], ancestral=True), 0)
    assert not infer(made, gaussian(1), before, [predicted]).trusted


# Through the runtime ----------------------------------------------------------------------------


class Sampler:
    """One generation of a toy under a scheduler of diffusers."""

    def __init__(self, compiled: Any, made: Any, seed: int = 0, text: Tensor | None = None) -> None:
        self.compiled, self.made = compiled, made
        self.prompt = prompt() if text is None else text
        self.latent, self.index = noise(seed), 0

    def step(self) -> Tensor:
        time = self.made.timesteps[self.index]
        predicted = self.compiled(self.latent, time[None], self.prompt)
        self.latent = self.made.step(predicted, time, self.latent).prev_sample
        self.index += 1
        return predicted

    def run(self) -> None:
        for _ in self.made.timesteps[self.index :]:
            self.step()


@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ddim", "dpm2"])
def test_whole_runs_never_fall_back(name, kind, steps):
    made = scheduler("dpm" if name == "dpm2" else name, kind, 0, steps)
    if name == "dpm2":
        made = DPMSolverMultistepScheduler.from_config(made.config, solver_order=2)
        made.set_timesteps(steps)
    compiled = toy(programs=ToyPrograms(unit=1000), **PLAN)
    Sampler(compiled, made).run()
    stats = sd.stats(compiled)
    assert (stats.evaluations, stats.speculative, stats.fallbacks) == (steps, 1, {})
    assert stats.selective == steps - 3 - (steps - 3) // 4


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_speculation_lands_where_the_scheduler_would(kind, given):
    """With a session's times without reading anything back."""
    made = scheduler("ddim", kind, 2, steps=10)  # 900, 800, ...
    programs = ToyPrograms(unit=1000)
    compiled = toy(programs=programs, **PLAN)
    run = Sampler(compiled, made)
    run.step()
    if given:
        sd.reset(compiled)
        run = Sampler(compiled, made)
        with sd.session(compiled, timesteps=made.timesteps), NoReadback():
            run.latent = made.step(
                compiled(run.latent, made.timesteps[:1], run.prompt), 900, run.latent
            ).prev_sample
            predicted = compiled(run.latent, made.timesteps[1:2], run.prompt)
        before = run.latent
    else:
        before, predicted = run.latent, run.step()
    landed, time = programs.passing[-1]
    end = 400 if given else 450
    assert time.item() == end
    weights = Diffusion(kind, usual_tables()[2]).jump(800, end)
    expected = weights[0] * before + weights[1] * predicted
    torch.testing.assert_close(landed, expected, rtol=1e-3, atol=1e-4)


def test_two_generations_side_by_side_on_one_prompt_tensor_are_told_apart():
    def run_on(compiled, seed):
        return Sampler(compiled, scheduler("ddim", "epsilon", 0), seed, text)

    compiled, text = toy(programs=ToyPrograms(unit=1000), **PLAN), prompt()
    runs = [run_on(compiled, seed) for seed in range(2)]
    for _ in range(20):
        for run in runs:
            run.step()
    for seed, run in enumerate(runs):
        alone = run_on(toy(programs=ToyPrograms(unit=1000), **PLAN), seed)
        alone.run()
        torch.testing.assert_close(run.latent, alone.latent, rtol=0, atol=0)
    assert sd.stats(compiled).fallbacks == {}


def test_a_change_of_guidance_between_two_evaluations_costs_the_look_ahead_alone():
    compiled = toy(programs=ToyPrograms(2, unit=1000), **PLAN)
    made = scheduler("ddim", "epsilon", 0)
    text, latent = prompt(batch=2), torch.cat([noise()] * 2)
    for index in range(3):
        if index == 1:
            sd.configure(compiled, guidance_scale=3.0)
        time = made.timesteps[index]
        latent = made.step(compiled(latent, time.expand(2), text), time, latent).prev_sample
    assert sd.stats(compiled).fallbacks == {}


@pytest.mark.parametrize("name", SAMPLERS)
def test_numbers_on_the_host_are_those_of_tensors(name):
    """What is known of one candidate agrees with what is said of all of them at once."""
    made = scheduler(name, "epsilon", 0)
    before, predicted, after = one_step(made)
    start, end = made.timesteps[:2].tolist()
    seen = Displacement.of([after], [before], [(predicted,), (gaussian(3),)])
    fetched = seen.fetched(seen.products.flatten().tolist())
    candidates = processes("auto", None)
    residuals = fetched.fits(candidates, start, end).residuals
    for index, candidate in enumerate(candidates):
        for way in range(2):
            found = fetched.misfit(candidate, way, start, end)
            assert found == pytest.approx(residuals[index, way].item(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("scale", "noise_share"), [(-0.1, 0.0), (-0.1, 0.05), (0.2, 0.3)])
def test_a_step_on_the_host_is_that_of_tensors(scale, noise_share):
    before, predicted = gaussian(0), gaussian(1)
    after = before + scale * predicted + noise_share * scale * gaussian(2)
    seen = Displacement.of([after], [before], [(predicted,)])
    fetched = seen.fetched(seen.products.flatten().tolist())
    candidates = processes("auto", None)
    for later in (None, True):
        steps = [
            Prediction.infer(each, candidates, 1.0, 0.9, 1, exact=False).step(
                0.9, 0.7, each if later else None
            )
            for each in (seen, fetched)
        ]
        on_device, on_host = ([float(number) for number in step] for step in steps)
        assert on_host == pytest.approx(on_device, rel=1e-4)


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize(
    ("dtype", "span", "share", "told"),
    [
        (torch.float32, -0.0065, 1.0, True),
        (torch.bfloat16, -0.0065, 1.0, True),  # 50 steps, shift 3: a sixth of it is rounding
        (torch.float32, -0.0065, 0.9, False),  # of the step, the rest is another call's
        (torch.bfloat16, -0.04, 0.9, False),
    ],
)
def test_a_step_of_exact_times_is_believed_where_a_call_explains_it(
    dtype, span, share, told, on_host
):
    before, predicted, other = (gaussian(seed).to(dtype) for seed in range(3))
    velocity = share * predicted.float() + (1 - share**2) ** 0.5 * other.float()
    after = (before.float() + span * velocity).to(dtype)
    seen = Displacement.of([after], [before], [(predicted,)])
    if on_host:
        seen = seen.fetched(seen.products.flatten().tolist())
    found = Prediction.infer(
        seen, processes("auto", None), 1.0, 1.0 + span, 1, exact=True,
        precision=torch.finfo(dtype).eps,
    )  # fmt: skip
    _, moved = found.step(0.9, 0.7)
    assert found.trusted
    assert float(moved) == (pytest.approx(-0.2, rel=0.05) if told else 0.0)
