"""Sessions with times: counted without reading, whatever calls are left out or come anew."""

import contextvars
import itertools

import pytest
import torch

import specdiff as sd
from specdiff.runtime.step.dispatch import Runtime
from tests.helpers import PLAN
from tests.runtime.toy import Euler, ToyPrograms, dense_velocity, noise, prompt, sigmas, toy


def guided(model, seed, until, steps=12):
    """A generation whose unconditional half ends early; errors of both halves."""
    times, latent = sigmas(steps), noise(seed)
    texts = prompt(seed), prompt(99)
    errors = ([], [])
    for index, (now, then) in enumerate(itertools.pairwise(times)):
        time, velocities = torch.tensor([now]), []
        for text, found in list(zip(texts, errors, strict=True))[: 1 + (index < until)]:
            velocity = model(latent, time, text)
            exact = dense_velocity(model, latent, time, text)
            found.append(((velocity - exact).norm() / exact.norm()).item())
            velocities.append(velocity)
        mixed = velocities[0] + 3.0 * (velocities[0] - velocities[-1])
        latent = latent + (then - now) * mixed
    return errors


@pytest.mark.parametrize("until", [1, 5, 11])
def test_guidance_that_ends_early(until):
    """A half that is left out in the end begins anew with the next generation."""
    model = toy(**PLAN)
    with sd.session(model, timesteps=sigmas(12)[:-1]):
        rounds = [guided(model, seed, until) for seed in range(3)]
    for conditional, unconditional in rounds:
        assert max(conditional[:3]) < 1e-6
        assert max(unconditional[:3]) < 1e-6


def test_guidance_that_begins_late_has_the_times_of_its_steps():
    model = toy(**PLAN)
    times, latent = sigmas(10), noise()
    with sd.session(model, timesteps=times[:-1]) as session:
        for index, now in enumerate(times[:-1]):
            for text in [prompt(), prompt(99)][: 1 + (index > 3)]:
                model(latent, torch.tensor([now]), text)
        late = session.table(model.runtime)._streams[-1]
    assert late.times == times[:10]  # those of the other half, before it began
    assert late.given == tuple(times[:10])


def test_another_graph_takes_over_in_mid_generation():
    """As an adapter does that is switched on: its plan goes on, from a dense step.

    The first graph begins anew with the next generation.
    """
    model, text = toy(**PLAN), prompt()
    graphs = [model.runtime, Runtime(ToyPrograms(), model.runtime.options)]
    times = sigmas(10)
    with sd.session(model, timesteps=times[:-1]) as session:
        for seed in range(3):
            run = Euler(model, seed, text=text)
            for graph in graphs:
                model.runtime = graph
                run.run(5)
                (stream,) = session.table(graph)._streams
                assert stream.times == (times[:5] if graph is graphs[0] else times[:10])
            assert max(run.errors[:3] + run.errors[5:6]) < 1e-6


def test_a_generation_that_ends_in_an_exception_is_not_gone_on_with():
    model, text = toy(**PLAN), prompt()
    session = sd.session(model, timesteps=sigmas(10)[:-1])
    with pytest.raises(RuntimeError), session:
        Euler(model, 0, text=text).run(5)
        raise RuntimeError
    with session:
        run = Euler(model, 0, text=text).run()
    sd.reset(model)
    with sd.session(model, timesteps=sigmas(10)[:-1]):
        alone = Euler(model, 0, text=text).run()
    torch.testing.assert_close(run.velocities, alone.velocities, rtol=0, atol=0)


def test_a_session_left_in_another_context_says_so(caplog):
    """A generator that a server drives in one context a step."""
    model = toy(**PLAN)

    def previews():
        with sd.session(model, cache_ratio=0.0):
            yield

    steps = previews()
    for _ in range(2):
        contextvars.copy_context().run(next, steps, None)
    assert "left in another context" in caplog.text


def unconditional_first(model, seed, calls, steps=12):
    """A generation whose unconditional half is called first, at some evaluations; errors."""
    times, latent = sigmas(steps), noise(seed)
    errors = ([], [])
    for index, (now, then) in enumerate(itertools.pairwise(times)):
        for text, found in zip([prompt(99), prompt(seed)], errors, strict=True):
            if found is errors[0] and not calls(index):
                continue
            time = torch.tensor([now])
            velocity = model(latent, time, text)
            exact = dense_velocity(model, latent, time, text)
            found.append(((velocity - exact).norm() / exact.norm()).item())
        latent = latent + (then - now) * velocity
    return errors


@pytest.mark.parametrize(
    "calls",
    [lambda i: i < 11, lambda i: i < 5, lambda i: i > 0, lambda i: i != 6],
    ids=["not the last", "five", "not the first", "one left out"],
)
def test_the_half_called_first_is_left_out_at_times(calls):
    model = toy(**PLAN)
    half = prompt(99)  # kept: the same tensor in each generation
    with sd.session(model, timesteps=sigmas(12)[:-1]) as session:
        for seed in range(3):
            unconditional, conditional = unconditional_first(model, seed, calls)
            assert max(unconditional[:2] + conditional[:2]) < 1e-6
            for stream in session.table(model.runtime)._streams:
                first = stream.place.first
                assert stream.times == sigmas(12)[first : first + len(stream.times)]
    del half


@pytest.mark.parametrize("at", [1, 4, 11])
def test_a_prompt_that_takes_over(at):
    """Even for one evaluation: neither prompt is gone on with in the next generation."""
    model, texts = toy(**PLAN), (prompt(0), prompt(1))
    times = sigmas(12)
    with sd.session(model, timesteps=times[:-1]):
        for seed in range(3):
            run = Euler(model, seed, steps=12, text=texts[0]).run(at)
            run.prompt = texts[1]
            run.run()
            assert run.errors[0] < 1e-6
            assert run.errors[at] < 1e-6


def test_a_generation_cut_short_and_another_prompt():
    model = toy(**PLAN)
    kept = [prompt(seed) for seed in range(3)]
    with sd.session(model, timesteps=sigmas(12)[:-1]):
        Euler(model, 0, steps=12, text=kept[0]).run(5)
        for seed in (1, 2):
            run = Euler(model, seed, steps=12, text=kept[seed]).run()
            with sd.session(model, timesteps=sigmas(12)[:-1]):
                alone = Euler(model, seed, steps=12, text=kept[seed]).run()
            torch.testing.assert_close(run.velocities, alone.velocities, rtol=0, atol=0)


def test_reset_in_mid_generation():
    model, text = toy(**PLAN), prompt()
    with sd.session(model, timesteps=sigmas(12)[:-1]):
        for seed in range(3):
            run = Euler(model, seed, steps=12, text=text).run(6)
            if not seed:
                sd.reset(model)
            run.run()
            assert max(run.errors[0], run.errors[6] if not seed else 0.0) < 1e-6


def test_halves_in_their_order_are_never_read(monkeypatch):
    """But once, where the second one turns up."""
    read = []
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda *pair: read.append(pair) or equal(*pair))
    model, texts = toy(**PLAN), (prompt(0), prompt(1))
    times, latent = sigmas(10), noise()
    with sd.session(model, timesteps=times[:-1]):
        for _ in range(2):
            for now in times[:-1]:
                for text in texts:
                    model(latent, torch.tensor([now]), text)
    assert len([times for times in read if times[0].numel() == 1]) == 2


def test_a_time_buffer_that_is_refilled_in_inference_mode():
    model, texts = toy(**PLAN), (prompt(0), prompt(1))
    times = sigmas(10)
    with torch.inference_mode(), sd.session(model, timesteps=times[:-1]) as session:
        buffer, latent = torch.zeros(1), noise()
        for index, now in enumerate(times[:-1]):
            model(latent, buffer.fill_(now), texts[index >= 4])
        stream = session.table(model.runtime)._streams[-1]
    assert stream.times == times[4:10]
