"""Sessions, configure, reset, stats and options, as users call them."""

import dataclasses
import inspect
import logging
import traceback
from contextlib import nullcontext

import pytest
import torch

import specdiff
import specdiff as sd
from specdiff.errors import NotCompiledError, OptionError
from specdiff.options import FORECASTS, NO_LONGER, OPTIONS, RUNTIME_OPTIONS, Options
from specdiff.plan import Plan
from specdiff.runtime.sampler.remains import Awaited
from specdiff.runtime.tokens.forecast import FORECASTERS
from specdiff.runtime.tokens.importance import SCORERS
from specdiff.settings import METHODS, Settings
from tests.helpers import PLAN, step_counts
from tests.runtime.toy import (
    UNCORRECTED,
    Euler,
    ToyPrograms,
    dense_velocity,
    noise,
    prompt,
    sigmas,
    streams_of,
    toy,
)


class NoReadback(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails on every transfer of a value from the device to the host that must be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        callers = [frame.f_code for frame, _ in traceback.walk_stack(None)]
        if Awaited.read.__code__ in callers:
            return func(*args, **(kwargs or {}))  # it was copied earlier
        assert name not in ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("per_model", [lambda s: s, lambda s: s * 1000])
def test_session_with_times_reads_nothing_back(per_model):
    """And decides as without one, but that speculation lands on a time of the list."""
    model = toy(**PLAN)
    run = Euler(model)
    session = sd.session(model, timesteps=[per_model(s) for s in run.sigmas[:-1]])
    latent, landing = run.latent, run.sigmas[5]
    time_input = torch.empty(1)
    for index in range(10):
        before = latent
        time_input.copy_(run.time(index))
        with session, NoReadback():
            velocity = model(latent, time_input, run.prompt)
        latent = latent + (run.sigmas[index + 1] - run.sigmas[index]) * velocity
        if index == 1:
            landed, time = model.runtime.programs.passing[-1]
            torch.testing.assert_close(time, torch.tensor([landing]))
            jumped = before + (landing - run.sigmas[1]) * velocity
            torch.testing.assert_close(landed, jumped, rtol=1e-3, atol=1e-4)
    assert step_counts(model) == (4, 6, 0)
    assert sd.stats(model).speculative == 1
    assert streams_of(model) == []


def test_session_agrees_with_the_implicit_stream():
    options = {**PLAN, "plan": Plan.every(4, warmup=3, lookahead=0), **UNCORRECTED}
    model = toy(**options)
    run = Euler(model)
    with sd.session(model, timesteps=torch.tensor(run.sigmas[:-1])):
        run.run()
    torch.testing.assert_close(run.velocities, Euler(toy(**options)).run().velocities)


def test_session_speculation_on_a_trajectory_that_is_no_flow():
    model, text = toy(**PLAN), prompt()
    with sd.session(model, timesteps=sigmas(10)[:-1]) as session:
        for index in range(4):
            model(noise(index), torch.tensor([sigmas(10)[index]]), text)
        (stream,) = session.table(model.runtime)._streams
    assert torch.equal(stream.selected.speculative[0][1], torch.ones(1, 16))


def test_concurrent_sessions_on_one_prompt_tensor_never_mix():
    plan = {**PLAN, **UNCORRECTED}  # which knows the next time in the last of the sessions
    model, text = toy(**plan), prompt()
    runs = [Euler(model, seed, text=text) for seed in range(3)]
    sessions = [
        sd.session(model),
        sd.session(model, cache_ratio=0.5),
        sd.session(model, timesteps=runs[2].sigmas[:-1], cache_ratio=1.0),
    ]
    for _ in range(10):
        for run, session in zip(runs, sessions, strict=True):
            with session:
                run.step()
    ratios = (0.75, 0.5, 1.0)
    for seed, (run, ratio) in enumerate(zip(runs, ratios, strict=True)):
        alone = Euler(toy(**{**plan, "cache_ratio": ratio}), seed, text=text).run()
        torch.testing.assert_close(run.velocities, alone.velocities)
    assert step_counts(model) == (12, 12, 6)


def test_sessions_nest_and_belong_to_their_model():
    model, other = toy(**PLAN), toy(1, **PLAN)
    outer, inner = sd.session(model, cache_ratio=0.0), sd.session(other, cache_ratio=0.0)
    with outer, inner, outer:
        pass
    with outer, inner:
        Euler(model).run()
    assert step_counts(model) == (10, 0, 0)
    sd.configure(other, cache_ratio=0.5)
    with inner, sd.session(other, cache_ratio=1.0):
        Euler(other).run()
    assert step_counts(other) == (4, 0, 6)
    sd.reset(other)
    Euler(other).run()
    assert step_counts(other) == (4, 6, 0)
    assert sd.stats(other).tokens_computed == 5 * 16 + 6 * 8


def test_separate_guidance_calls_are_two_streams_of_a_session():
    model = toy(**PLAN)
    runs = [Euler(model, 0), Euler(model, 1)]
    with sd.session(model, timesteps=runs[0].sigmas[:-1]):
        for _ in range(10):
            for run in runs:
                run.step()
    assert step_counts(model) == (8, 12, 0)


def test_conditions_made_anew_are_known_by_value_in_a_session():
    model = toy(**PLAN)
    runs = [Euler(model, 0), Euler(model, 1)]
    with sd.session(model):
        for _ in range(10):
            for run in runs:
                run.prompt = run.prompt.clone()
                run.step()
    assert step_counts(model) == (8, 12, 0)


def test_session_starts_again_when_its_times_are_used_up():
    model, text = toy(**PLAN), prompt()
    with sd.session(model, timesteps=sigmas(10)[:-1]):
        first = Euler(model, 0, text=text).run()
        second = Euler(model, 1, text=text).run()
    assert step_counts(model) == (8, 12, 0)
    assert second.errors[0] == second.errors[1] == 0.0
    with sd.session(model, timesteps=sigmas(10)[:-1]):
        alone = Euler(model, 1, text=text).run()
    torch.testing.assert_close(second.velocities, alone.velocities, rtol=0, atol=0)
    assert first.errors[0] == 0.0


@pytest.mark.parametrize("ratio", [0.75, 1.0])
def test_nan_in_a_session_is_nan_where_dense_is(ratio):
    options = {"plan": Plan.every(4, warmup=3, lookahead=0), "cache_ratio": ratio, **UNCORRECTED}
    model = toy(programs=ToyPrograms(batch=2), **options)
    run = Euler(model, batch=2)
    with sd.session(model, timesteps=run.sigmas[:-1]):
        run.run(4)
        run.latent[1, 0, 0, 0] = float("nan")
        exact = dense_velocity(model, run.latent, run.time(), run.prompt)
        velocity = run.step()
        assert torch.equal(velocity.isnan(), exact.isnan())
        assert velocity[1].isnan().all()
        assert not velocity[0].isnan().any()
        run.run()
        again = Euler(model, batch=2, text=run.prompt).run()
    sd.reset(model)
    alone = Euler(model, batch=2).run()
    torch.testing.assert_close(again.velocities, alone.velocities)


def test_session_without_a_time_input():
    model = toy(programs=ToyPrograms(time=False), **PLAN)
    run = Euler(model)
    fixed = run.time(0)
    with sd.session(model, timesteps=run.sigmas[:-1]):
        for index in range(10):
            velocity = model(run.latent, fixed, run.prompt)
            run.latent = run.latent + (run.sigmas[index + 1] - run.sigmas[index]) * velocity
    assert step_counts(model) == (4, 6, 0)
    assert sd.stats(model).speculative == 0


def test_twenty_settings_in_one_process():
    model = toy()
    for method in METHODS:
        for forecast in FORECASTS:
            for ratio in (0.75, 1.0):
                sd.configure(model, method=method, forecast=forecast, cache_ratio=ratio)
                run = Euler(model).run()
                expected = toy(method=method, forecast=forecast, cache_ratio=ratio)
                alone = Euler(expected).run()
                torch.testing.assert_close(run.velocities, alone.velocities, rtol=0, atol=0)
    assert sd.stats(model).graphs == 1


def test_settings_change_in_mid_run():
    model = toy(plan=Plan.warmup(3, lookahead=0), **UNCORRECTED)
    run = Euler(model).run(5)
    sd.configure(model, plan=Plan.warmup(3), cache_ratio=0.5)
    run.run(1)  # dense: no caches were filled yet
    assert run.errors[-1] < 1e-6
    run.run()
    assert step_counts(model) == (4, 4, 2)
    assert max(run.errors) < 0.5


def test_configure_before_the_first_call_and_back_to_defaults():
    model = toy(**PLAN)
    sd.configure(model, cache_ratio=0.0)
    Euler(model).run()
    assert step_counts(model) == (10, 0, 0)
    sd.configure(model, cache_ratio=0.9, method="paper")
    sd.reset(model)
    Euler(model).run()
    stats = sd.stats(model)
    assert (stats.dense, stats.selective) == (4, 6)
    assert stats.tokens_computed == 5 * 16 + 6 * 2
    sd.configure(model, cache_ratio=None)
    sd.reset(model)
    Euler(model).run()
    assert step_counts(model) == (4, 0, 6)


def test_reset_forgets_streams_and_counts_but_not_settings():
    model = toy(**PLAN)
    sd.configure(model, cache_ratio=0.5)
    session = sd.session(model)
    run = Euler(model)
    run.run(5)
    with session:
        Euler(model, text=run.prompt).run(5)
    assert sd.stats(model).cache_bytes == 2 * model.runtime.programs.signature.cache_bytes
    sd.reset(model)
    stats = sd.stats(model)
    assert (stats.evaluations, stats.tokens_total, stats.cache_bytes) == (0, 0, 0)
    assert stats.token_counts is None
    run.run()
    assert run.errors[5] == 0.0  # dense again: the stream was forgotten
    assert sd.stats(model).tokens_computed == 4 * 16 + 2 * 8


def test_models_without_state_are_named():
    model = toy(**PLAN)
    for call in (sd.stats, sd.reset):
        with pytest.raises(NotCompiledError, match="Toy has not run"):
            call(model)
    with pytest.raises(NotCompiledError, match="no parameters"):
        sd.configure(torch.nn.ReLU(), cache_ratio=0.5)
    for call in (sd.stats, sd.reset, sd.configure, sd.session):
        with pytest.raises(NotCompiledError, match=r"a dict is no .*pipe.transformer"):
            call({})


@pytest.mark.parametrize("name_rows", [False, True])
def test_a_session_of_a_model_that_is_neither_compiled_nor_attached_says_so(caplog, name_rows):
    model = torch.nn.Linear(2, 2)
    for _ in range(2):
        session = sd.session(model)
        with sd.rows(model, [session]) if name_rows else session:
            model(torch.zeros(1, 2))
    assert caplog.text.count("specdiff.attach(model)") == 1


def test_a_class_is_no_scheduler():
    class Scheduler:
        def step(self): ...

    with pytest.raises(OptionError, match=r"Scheduler is a class.*pipe.scheduler"):
        sd.session(toy(), scheduler=Scheduler)


def test_a_noise_schedule_of_numpy():
    given = torch.linspace(0.99, 0.01, 10)
    found = Options(alphas_cumprod=given.numpy()).alphas_cumprod
    assert found == Options(alphas_cumprod=given).alphas_cumprod


def test_stats_finds_the_wrapped_model():
    model = toy(**PLAN)
    Euler(model).run()
    wrapper = torch.nn.Sequential(model)
    assert sd.stats(wrapper) == dataclasses.replace(
        sd.stats(model), token_counts=sd.stats(wrapper).token_counts
    )


@pytest.mark.parametrize(
    ("name", "value", "valid"),
    [
        ("cache_ratio", 1.5, "a number from 0 to 1"),
        ("cache_ratio", "0.9", "a number from 0 to 1"),
        ("cache_ratio", float("nan"), "a number from 0 to 1"),
        ("cache_ratio", True, "a number from 0 to 1"),
        ("quality", "best", "one of 'dense', 'closest', 'near-lossless', 'balanced', 'fast'"),
        ("plan", 3, "a Plan, a file made by `specdiff tune`"),
        ("forecast", "quadratic", "one of 'reuse', 'linear', 'mean'"),
        ("text_steps", 0, "one of 'all', 'dense'"),
        ("ablation", {"cache_ratio": 1}, "an object with some of reuse_share, starvation"),
        ("method", "papers", "one of 'history', 'paper'"),
        ("guidance_scale", "7", "a number"),
        ("timestep_arg", "", "a non-empty string"),
        ("max_cache_bytes", -1, "an integer of at least 0"),
        ("kv_cache_dtype", "int4", "one of 'int8', 'fp8_e4m3'"),
        ("inner_backend", "cudagraphs", "one of 'inductor', 'aot_eager', 'eager'"),
        ("dump_dir", 3, "a path"),
    ],
)
def test_invalid_values_name_option_value_and_range(name, value, valid):
    with pytest.raises(OptionError) as caught:
        Options(**{name: value})
    assert f"{name}={value!r}: must be {valid}" in str(caught.value)
    if name in RUNTIME_OPTIONS:
        with pytest.raises(OptionError):
            sd.configure(toy(), **{name: value})
        with pytest.raises(OptionError):
            sd.session(toy(), **{name: value})


def test_parse_separates_inductor_settings():
    keys = {"max_autotune", "triton.cudagraphs"}
    given = {"cache_ratio": 0.5, "mode": "max-autotune", "triton.cudagraphs": True}
    options, inductor = Options.parse(given, keys)
    assert options == Options(cache_ratio=0.5)
    assert inductor == {"mode": "max-autotune", "triton.cudagraphs": True}
    assert Options.parse({"max-autotune": True}, keys)[1] == {"max_autotune": True}
    with pytest.raises(OptionError, match=r"cache_ration: no such option.*'cache_ratio'.*method"):
        Options.parse({"cache_ration": 0.5}, keys)
    with pytest.raises(OptionError, match="did you mean 'max_autotune'"):
        Options.parse({"max_autotun": True}, keys)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("warmup_steps", 3, "write plan=specdiff.Plan.warmup(3)"),
        ("refresh_interval", 5, "write plan=specdiff.Plan.tapered(5) or Plan.every(5)"),
        ("speculative_steps", 0, "write lookahead=0 in a plan"),
        ("text_refresh", 0, 'write text_steps="all" (was 1) or text_steps="dense" (was 0)'),
        *((name, 1, "") for name in NO_LONGER),
    ],
)
def test_an_option_of_old_says_what_to_write_instead(name, value, said):
    plan = {"specdiff_plan": 1, "rule": {"every": 2}, "settings": {name: value}}
    for give in (
        lambda: Options.parse({name: value}, {"max_autotune"}),
        lambda: sd.configure(toy(), **{name: value}),
        lambda: sd.session(toy(), **{name: value}),
        lambda: Options(plan=plan),
    ):
        with pytest.raises(OptionError) as caught:
            give()
        assert f"{name}: gone; {said}" in str(caught.value)


def test_there_are_few_options():
    assert len(OPTIONS) <= 15
    with pytest.raises(OptionError) as caught:
        Options.parse({"bogus": 1}, set())
    assert str(caught.value).endswith("options: " + ", ".join(OPTIONS))


def test_compile_time_options_cannot_be_configured():
    fixed = ("timestep_arg", "kv_cache_dtype", "inner_backend", "dump_dir")
    assert set(RUNTIME_OPTIONS) == set(OPTIONS) - set(fixed)
    for name in fixed:
        with pytest.raises(OptionError, match="fixed when the model is compiled"):
            sd.configure(toy(), **{name: None})
    with pytest.raises(OptionError, match="did you mean 'cache_ratio'"):
        sd.session(toy(), cache_rato=0.5)


@pytest.mark.parametrize(
    "times",
    [[], [1.0, float("nan")], [1.0, 0.5, 0.7], 28, torch.ones(2, 2), "abc", ["a"], [[1.0], []]],
)
def test_invalid_timesteps(times):
    with pytest.raises(OptionError, match="timesteps: must"):
        sd.session(toy(), timesteps=times)


def test_every_option_is_documented_and_every_choice_exists():
    source = inspect.getsource(Options)
    for field in dataclasses.fields(Options):
        declaration = source.split(f"    {field.name}: ")[1]
        assert '    """' in declaration.split("\n\n")[0], field.name
    assert set(FORECASTERS) == set(FORECASTS)
    assert set(SCORERS) == set(METHODS)
    for method in METHODS:
        settings = Options(method=method).resolve()
        assert None not in {
            getattr(settings, f.name)
            for f in dataclasses.fields(Settings)
            if f.name not in ("guidance_scale", "alphas_cumprod", "max_cache_bytes")
        }


def switched_off(monkeypatch, how, model):
    """A context in which acceleration is off."""
    if how == "session":
        return sd.session(model, quality="dense")
    if how == "configure":
        sd.configure(model, quality="dense")
    else:
        monkeypatch.setenv("SPECDIFF", how)
    return nullcontext()


@pytest.mark.parametrize("how", ["session", "configure", "off", "OFF"])
def test_switched_off_the_model_is_dense_and_says_so_once(monkeypatch, caplog, how):
    model = toy(**PLAN, quality=None)
    plain = Euler(toy(cache_ratio=0.0)).run()
    caplog.set_level(logging.INFO, "specdiff")
    with switched_off(monkeypatch, how, model), specdiff.record(model) as recording:
        run = Euler(model).run()
    assert all(torch.equal(a, b) for a, b in zip(run.velocities, plain.velocities, strict=True))
    stats = sd.stats(model)
    assert step_counts(model) == (10, 0, 0) and stats.fallbacks == {}
    assert stats.tokens_computed == stats.tokens_total == 10 * 16
    assert {(step.kind, step.active_share) for step in recording.steps} == {("dense", 1.0)}
    (said,) = [r for r in caplog.records if "acceleration is off" in r.message]
    assert said.levelno == logging.INFO
    monkeypatch.delenv("SPECDIFF", raising=False)
    sd.configure(model, quality=None)  # what it had before counts again
    Euler(model).run()
    assert step_counts(model) == (14, 6, 0)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("off", [range(4, 6), range(2), range(8, 10), range(7)])
def test_acceleration_switched_off_and_on_within_a_generation(monkeypatch, given, off):
    """What goes on afterwards begins with dense steps and agrees with a dense run throughout."""
    model, other = toy(**PLAN), toy(cache_ratio=0.0)
    run, exact = Euler(model), Euler(other).run()
    with sd.session(model, timesteps=run.sigmas[:-1] if given else None):
        for index in range(10):
            monkeypatch.setenv("SPECDIFF", "off" if index in off else "on")
            run.step()
        again = Euler(model, text=run.prompt)
        monkeypatch.delenv("SPECDIFF")
        again.run()
    assert all(run.errors[index] < 1e-6 for index in off)
    assert off.stop == 10 or run.errors[off.stop] < 1e-6  # the first afterwards is dense
    torch.testing.assert_close(run.latent, exact.latent, rtol=0.2, atol=0.2)
    alone = Euler(toy(**PLAN))
    with sd.session(alone.model, timesteps=alone.sigmas[:-1] if given else None):
        alone.run()
    torch.testing.assert_close(again.velocities, alone.velocities, rtol=1e-5, atol=1e-6)
    assert sd.stats(model).fallbacks == {}


def test_the_models_own_graph_answers_while_acceleration_is_off():
    model, calls = toy(**PLAN), []
    programs = model.runtime.programs

    def plain(*inputs):
        calls.append(inputs)
        return programs.tail(inputs, programs._run(inputs, None, None).tokens)

    model.runtime._plain = plain
    with sd.session(model, quality="dense"):
        Euler(model).run(3)
    assert len(calls) == 3 and programs.names() == []
