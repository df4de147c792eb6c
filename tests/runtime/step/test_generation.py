"""One generation: which programs run, what they count, and that speculation leaves no trace."""

import copy

import pytest
import torch

import specdiff as sd
from specdiff.options import Options
from specdiff.plan import Plan
from specdiff.runtime.step.dispatch import Runtime
from specdiff.runtime.tokens.forecast import REACH, forecast
from specdiff.runtime.tokens.history import History
from specdiff.runtime.tokens.importance import log_scores
from tests.helpers import PLAN
from tests.runtime.toy import (
    CHANNELS,
    SIDE,
    UNCORRECTED,
    Euler,
    N,
    Toy,
    ToyPrograms,
    dense_velocity,
    noise,
    prompt,
    streams_of,
    toy,
)


def test_programs_follow_the_schedule():
    model = toy(**PLAN)
    Euler(model, steps=10).run()
    # The one in third place is the speculative evaluation, after the second real one.
    assert model.runtime.programs.names() == (
        ["scratch", "dense", "scratch", "dense"] + ["selective"] * 3 + ["dense"] + ["selective"] * 3
    )
    actives = [active for _, active in model.runtime.programs.calls if active is not None]
    assert all(active.shape == (1, 4) and active.dtype == torch.int64 for active in actives)
    assert all((active.diff(dim=1) > 0).all() for active in actives)


def test_dense_steps_are_exact_and_selective_ones_are_not():
    run = Euler(toy(**{**PLAN, "plan": Plan.every(3, warmup=3), **UNCORRECTED}), steps=10).run()
    dense = [0, 1, 2, 5, 8]
    assert max(run.errors[i] for i in dense) < 1e-6
    assert min(error for i, error in enumerate(run.errors) if i not in dense) > 1e-5
    assert max(run.errors) < 0.3


def test_computed_tokens_are_exact_where_nothing_is_stale():
    """After a dense step, a selective one on the same latent gives the dense output."""
    model = toy(**PLAN)
    run = Euler(model).run(3)
    stream = streams_of(model)[0]
    previous, time = run.velocities[-1], run.time(2)
    (latent,) = stream.latents
    assert model.runtime.programs.names()[-1] == "dense"
    again = model(latent, time, run.prompt)
    assert model.runtime.programs.names()[-1] == "selective"
    torch.testing.assert_close(again, previous)


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        (PLAN, (4, 6, 0, 1)),
        ({**PLAN, "plan": Plan.every(4, warmup=3, lookahead=1)}, (4, 6, 0, 0)),
        ({**PLAN, "plan": Plan.every(4, warmup=3, lookahead=4)}, (4, 6, 0, 3)),
        ({**PLAN, "plan": Plan.warmup(3)}, (3, 7, 0, 1)),
        ({**PLAN, "plan": Plan.every(1, warmup=3)}, (10, 0, 0, 0)),  # and looks at nothing ahead
        ({**PLAN, "plan": Plan.every(4)}, (4, 6, 0, 1)),
        ({**PLAN, "cache_ratio": 1.0}, (4, 0, 6, 0)),
        ({**PLAN, "plan": Plan.every(4), "cache_ratio": 1.0}, (3, 0, 7, 0)),
        ({**PLAN, "cache_ratio": 0.0}, (10, 0, 0, 0)),
    ],
)
def test_stats_are_exact(options, counts):
    model = toy(**options)
    Euler(model, steps=10).run()
    stats = sd.stats(model)
    assert (stats.dense, stats.selective, stats.skipped, stats.speculative) == counts
    active = round((1 - options["cache_ratio"]) * N)
    assert stats.tokens_computed == (counts[0] + counts[3]) * N + counts[1] * active
    assert stats.tokens_total == 10 * N
    assert stats.token_counts.sum() == counts[0] * N + counts[1] * active
    assert stats.fallbacks == {}
    assert (stats.graphs, stats.recompiles) == (1, 0)
    assert stats.compile_seconds == {"dense": 1.0, "selective": 2.0}
    selects = counts[1] > 0
    signature = model.runtime.programs.signature
    assert stats.cache_bytes == selects * signature.cache_bytes
    assert f"{counts[1]} selective" in str(stats)


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        # selective are evaluations 3, 4, 6, 7 and 9, of which 5 and 8 are dense
        ({}, [True] * 5),
        ({"text_steps": "all"}, [True] * 5),
        ({"text_steps": "dense"}, [False] * 5),
    ],
)
def test_text_is_computed_in_the_steps_that_are_named(options, texts):
    plan = Plan.every(3, warmup=3)
    model = toy(method="paper", plan=plan, cache_ratio=0.9, **options)
    Euler(model, steps=10).run()
    assert model.runtime.programs.texts == texts


def test_whole_step_caching_is_linear_extrapolation():
    model = toy(plan=Plan.warmup(2), forecast="linear")
    run = Euler(model, steps=6).run(3)
    t0, t1, t2 = run.sigmas[:3]
    v0, v1, v2 = run.velocities
    reach = min((t2 - t1) / (t1 - t0), REACH)
    torch.testing.assert_close(v2, v1 + (v1 - v0) * reach)
    assert model.runtime.programs.names() == ["probe", "probe"]


def state_of_stream(stream):
    history = stream.history
    lease = stream.selected.lease.caches if stream.selected.lease else ()
    tensors = [*lease, history.counts, history.age, stream.selected.importance, *stream.latents]
    tensors += [*sum(stream.predictions, ()), stream.trail.model_time]
    tensors += [part for step in history.steps for part in step]
    tensors += [part for output in history.computed for part in output]
    return copy.deepcopy((tensors, stream.times, history.evaluations, stream.trail.direction))


@pytest.mark.parametrize("evaluations", [1, 2, 3])
def test_speculation_changes_nothing_but_scores(evaluations):
    """Until scores are used, all else is the same with and without, to the bit."""
    states, outputs = [], []
    for steps in (0, 3):
        model = toy(**{**PLAN, "plan": Plan.every(4, warmup=3, lookahead=steps)})
        outputs.append(Euler(model).run(evaluations).velocities)
        stream = streams_of(model)[0]
        assert len(stream.selected.speculative) == (2 if steps and evaluations > 1 else 0)
        states.append(state_of_stream(stream))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)


def test_speculation_lands_where_euler_would():
    model = toy(**PLAN)
    run = Euler(model, steps=10).run(1)
    start = run.sigmas[1]
    latent = run.latent
    velocity = run.step()
    landed, time = model.runtime.programs.passing[-1]
    torch.testing.assert_close(time, torch.tensor([0.5]))
    torch.testing.assert_close(landed, latent + (0.5 - start) * velocity)
    reference = model.runtime.programs._run(
        [*model.parameters(), landed, time, run.prompt, 4.0], None, None
    )
    expected = reference.importance / reference.importance.mean()
    torch.testing.assert_close(streams_of(model)[0].selected.speculative[0][1], expected.detach())


def test_future_importance_changes_the_choice():
    chosen = []
    for steps in (1, 2):
        model = toy(**{**PLAN, "plan": Plan.every(4, warmup=3, lookahead=steps)})
        Euler(model).run()
        chosen.append(torch.cat([a for _, a in model.runtime.programs.calls if a is not None]))
    assert not torch.equal(*chosen)


@pytest.mark.parametrize(
    ("sign", "unit", "rising"),
    [(1, 1, False), (1, 1000, False), (-1, 1, True), (-1, 1000, True), (1, 1, True)],
)
def test_meaning_of_time_is_inferred(sign, unit, rising):
    programs = ToyPrograms(sign=sign, unit=unit, rising=rising)
    model = toy(programs=programs, **PLAN)

    def as_time(sigma: float) -> float:
        return (1 - sigma if rising else sigma) * unit

    run = Euler(model, steps=10, as_time=as_time).run(1)
    latent, start = run.latent, run.sigmas[1]
    velocity = run.step()
    landed, time = programs.passing[-1]
    torch.testing.assert_close(time, torch.tensor([0.5 * unit]))
    torch.testing.assert_close(landed, latent + (0.5 - start) * velocity * sign)


def test_no_speculation_beyond_the_landing():
    """A run of few steps has passed half of the way by its second evaluation."""
    model = toy(**PLAN)
    run = Euler(model)
    run.sigmas = [1.0, 0.4, 0.3, 0.2, 0.0]
    run.run()
    assert sd.stats(model).speculative == 0
    assert model.runtime.programs.names() == ["scratch", "dense", "dense", "selective"]


def test_no_speculation_when_steps_have_the_wrong_length():
    """Along the velocity, but ten times too far for any unit of time."""
    model = toy(**PLAN)
    run = Euler(model, steps=100).run(1)
    run.latent = noise() + 10 * (run.latent - noise())
    run.step()
    assert sd.stats(model).speculative == 0


def test_no_speculation_when_the_sampler_is_no_flow(caplog):
    model = toy(**PLAN)
    run = Euler(model, text=prompt())
    model(run.latent, run.time(), run.prompt)
    with caplog.at_level("WARNING"):
        for index in (1, 2, 3):
            model(run.latent + 0.3 * noise(9 + index), run.time(index), run.prompt)
    stats = sd.stats(model)
    assert (stats.speculative, stats.selective) == (0, 0)
    assert stats.fallbacks == {"unexplained step": 1}
    first, second = caplog.messages
    assert first.startswith(
        "no speculation or correction: the sampler's steps fit neither a flow nor DDIM"
    )
    assert second.startswith("unexplained step: the latent moved where")


def test_a_latent_that_stays_where_it_is_while_time_moves_is_none():
    """Conditions of one graph of a broken model may have the shape of its output."""
    model = toy(**PLAN)
    run = Euler(model, text=prompt())
    for index in range(6):
        output = model(run.latent, run.time(index), run.prompt)
        exact = dense_velocity(model, run.latent, run.time(index), run.prompt)
        torch.testing.assert_close(output, exact)
    assert sd.stats(model).fallbacks == {"latent does not move with time": 3}


def test_outputs_survive_later_evaluations_and_callers():
    model, other = toy(**PLAN), toy(**PLAN)
    run, spoiled = Euler(model, steps=8), Euler(other, steps=8)
    kept = []
    for _ in range(8):
        kept.append(run.step().clone())
        velocity = spoiled.step()
        spoiled.velocities[-1] = velocity.clone()
        velocity.fill_(9.0)  # a sampler that works in place
    torch.testing.assert_close(run.velocities, kept, rtol=0, atol=0)
    torch.testing.assert_close(spoiled.velocities, kept, rtol=0, atol=0)


def test_latent_updated_in_place_by_the_sampler():
    plain, in_place = toy(**PLAN), toy(**PLAN)
    run = Euler(plain).run()
    other = Euler(in_place)
    latent = other.latent.clone()
    for index in range(10):
        velocity = in_place(latent, other.time(index), other.prompt)
        torch.testing.assert_close(velocity, run.velocities[index])
        latent += (other.sigmas[index + 1] - other.sigmas[index]) * velocity
    assert sd.stats(in_place).speculative == 1


def test_guidance_halves_share_one_active_set():
    options = {**PLAN, "guidance_scale": 5.0}
    model = toy(programs=ToyPrograms(batch=2), **options)
    separate = toy(programs=ToyPrograms(batch=2), **PLAN)
    text = prompt(batch=2)
    for compiled in (model, separate):
        latent = noise()
        run = Euler(compiled, batch=2)
        for index in range(6):
            velocity = compiled(torch.cat([latent] * 2), run.time(index), text)
            unconditional, conditional = velocity.chunk(2)
            guided = unconditional + 5.0 * (conditional - unconditional)
            latent = latent + (run.sigmas[index + 1] - run.sigmas[index]) * guided
    actives = [a for _, a in model.runtime.programs.calls if a is not None]
    assert len(actives) == 3
    assert all(torch.equal(a[0], a[1]) for a in actives)
    assert sd.stats(model).speculative == 1
    landed, jumped = model.runtime.programs.passing[-1][0], noise()
    velocity = dense_velocity(model, torch.cat([jumped] * 2), run.time(0), text)
    jumped = jumped + (run.sigmas[1] - 1) * torch.lerp(velocity[0], velocity[1], 5.0)
    velocity = dense_velocity(model, torch.cat([jumped] * 2), run.time(1), text)
    jumped = jumped + (0.5 - run.sigmas[1]) * torch.lerp(velocity[0], velocity[1], 5.0)
    torch.testing.assert_close(landed, torch.cat([jumped] * 2), rtol=1e-4, atol=1e-5)
    untold = [a for _, a in separate.runtime.programs.calls if a is not None]
    assert len(untold) == 3 and all(torch.equal(a[0], a[1]) for a in untold)  # it was learned


def test_guidance_halves_count_alike():
    """The shared set does not depend on which half comes first."""
    chosen = []
    for order in ([0, 1], [1, 0]):
        model = toy(programs=ToyPrograms(batch=2), **PLAN, guidance_scale=5.0, method="paper")
        run, text = Euler(model, batch=2), prompt(batch=2)[order]
        for index in range(6):
            latent = noise() * (1 - 0.03 * index)
            model(torch.cat([latent] * 2), run.time(index), text)
        chosen.append(torch.cat([a for _, a in model.runtime.programs.calls if a is not None]))
    assert torch.equal(*chosen)


def test_odd_batch_has_no_halves(caplog):
    model = toy(guidance_scale=5.0, **PLAN)
    with caplog.at_level("WARNING"):
        Euler(model).run()
    assert sd.stats(model).selective == 6
    assert "guidance_scale ignored: a batch of 1 has no two halves" in caplog.messages


def test_rows_of_a_batch_are_independent():
    """Each row of a batch chooses its own tokens, and gives what it gives alone."""
    model = toy(programs=ToyPrograms(batch=2), **PLAN)
    both = Euler(model, batch=2, steps=8).run()
    for row in range(2):
        alone = toy(**PLAN)
        run = Euler(alone, steps=8, text=both.prompt[row : row + 1])
        run.latent = noise(0, 2)[row : row + 1]
        run.run()
        torch.testing.assert_close(
            [v[row : row + 1] for v in both.velocities], run.velocities, rtol=1e-4, atol=1e-5
        )


def test_inference_mode_and_no_grad_can_alternate():
    model, reference = toy(**PLAN), toy(**PLAN)
    expected = Euler(reference).run().velocities
    run = Euler(model)
    for index in range(10):
        if index % 2:
            with torch.inference_mode():
                run.step()
        else:
            run.latent = run.latent.clone()
            run.step()
    torch.testing.assert_close(run.velocities, expected)
    with torch.inference_mode():
        Euler(model, seed=3, steps=10).run()
    assert sd.stats(model).selective == 12


@pytest.mark.parametrize("expanded", [True, False])
def test_speculation_keeps_the_strides_of_inputs(expanded):
    model = toy(programs=ToyPrograms(batch=2), **PLAN)
    run = Euler(model, batch=2)
    padded = torch.zeros(2, CHANNELS, SIDE, SIDE + 1)
    for index in range(2):
        padded[..., :SIDE] = run.latent
        time = run.time(index) if expanded else run.time(index).repeat(3)[::2][:2]
        velocity = model(padded[..., :SIDE], time, run.prompt)
        run.latent = run.latent + (run.sigmas[index + 1] - run.sigmas[index]) * velocity
    landed, landing = model.runtime.programs.passing[-1]
    assert landing.tolist() == [0.5, 0.5]
    assert landing.stride() == time.stride() == ((0,) if expanded else (2,))
    assert landed.stride() == padded[..., :SIDE].stride()


def test_history_of_tokens():
    """Each token keeps its own last computed outputs and when they were computed."""
    history = History(1, 3, torch.device("cpu"))

    def outputs(value):
        return torch.full((1, 3, 1), value)

    history.record_dense(1.0, outputs(10.0))
    history.record_dense(0.9, outputs(9.0))
    history.record_selective(0.8, outputs(8.0), torch.tensor([[1]]))
    history.record_skipped(0.7, outputs(7.0))
    history.record_selective(0.6, outputs(6.0), torch.tensor([[0, 1]]))
    assert history.counts.tolist() == [[3, 4, 2]]
    assert history.cached.tolist() == [[2, 1, 3]]
    assert history.age.tolist() == [[0, 0, 3]]
    assert [step.time for step in history.steps] == [0.6, 0.7, 0.8]
    times = torch.stack([output.times[0] for output in history.computed])
    expected = torch.tensor([[0.6, 0.6, 0.9], [0.9, 0.8, 1.0], [1.0, 0.9, 1.0]])
    torch.testing.assert_close(times, expected)
    tokens = torch.stack([output.tokens[0, :, 0] for output in history.computed])
    torch.testing.assert_close(tokens, expected * 10)


def test_the_linear_forecast_is_exact_on_lines():
    """Within its reach, whenever a token was computed."""
    line = torch.tensor([1.0, -2.0, 0.5])

    def outputs(time):
        return (line * time).reshape(1, 3, 1)

    history = History(1, 3, torch.device("cpu"))
    for time in (1.0, 0.9, 0.7):
        history.record_dense(time, outputs(time))
    history.record_selective(0.6, outputs(0.6), torch.tensor([[2]]))
    # tokens 0 and 1 went from 0.9 to 0.7, token 2 from 0.7 to 0.6
    at = 0.7 - 0.2 * REACH, 0.7 - 0.2 * REACH, 0.6 - 0.1 * REACH
    predicted = forecast("linear", history, 0.4, 1)
    torch.testing.assert_close(predicted, outputs(torch.tensor(at)), rtol=1e-4, atol=1e-4)


def test_tokens_waiting_longest_come_first_while_times_collide():
    history = History(1, 3, torch.device("cpu"))
    history.record_dense(1.0, torch.zeros(1, 3, 1))
    history.record_selective(1.0, torch.zeros(1, 3, 1), torch.tensor([[0]]))
    history.record_selective(1.0, torch.zeros(1, 3, 1), torch.tensor([[2]]))
    scores = log_scores(Options().resolve(), torch.ones(1, 3), None, history, 1.0)
    assert scores.argsort().tolist() == [[2, 0, 1]]


def test_a_failing_program_leaves_no_stream():
    model = toy(**PLAN)
    run = Euler(model).run(4)
    broken = model.runtime.programs.selective
    model.runtime.programs.selective = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(run.latent, run.time(), run.prompt)
    assert streams_of(model) == []
    model.runtime.programs.selective = broken
    run.run(2)
    assert max(run.errors[-2:]) < 1e-6


def test_dense_velocity_is_what_an_uncached_runtime_returns():
    model = toy(cache_ratio=0.0)
    run = Euler(model)
    torch.testing.assert_close(
        model(run.latent, run.time(), run.prompt),
        dense_velocity(model, run.latent, run.time(), run.prompt),
    )


def test_models_are_not_kept_alive():
    import gc
    import weakref

    model = Toy(Runtime(ToyPrograms(), Options()))
    Euler(model).run(4)
    runtime, dead = model.runtime, weakref.ref(model.embed)
    del model
    gc.collect()
    assert dead() is None
    assert runtime.pool._leased == 0
