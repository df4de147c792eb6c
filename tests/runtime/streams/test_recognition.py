"""A generation is recognised by its latent where its conditions are new tensors at every call."""

import contextlib
import itertools

import pytest
import torch
from torch import Tensor

import specdiff as sd
from specdiff.plan import Plan
from tests.runtime.toy import ToyPrograms, dense_velocity, noise, prompt, sigmas, toy

STEPS = 28
DENSE = (0, 2, 4, 7, 10, 14, 18, 22, 26, 27)
PLAN = Plan.tapered(4)
"""Which computes these."""
SESSIONS = pytest.mark.parametrize("session", ["none", "plain", "timed"])


def made_anew(text: Tensor, index: int) -> Tensor:
    return torch.cat([text])


def travels(text: Tensor, index: int) -> Tensor:
    return text * (1 + 0.01 * index)


def entered(kind, model, steps=STEPS):
    if kind == "none":
        return contextlib.nullcontext()
    return sd.session(model, timesteps=sigmas(steps)[:-1] if kind == "timed" else None)


def draw(model, conditions, seed=0, steps=STEPS, guidance=1.0):
    """Latents of a run whose call at each step gives one condition or more, one after another."""
    latent, levels = noise(seed), sigmas(steps)
    for index, (now, then) in enumerate(itertools.pairwise(levels)):
        time = torch.tensor([now])
        first, *rest = [model(latent, time, each) for each in conditions(index)]
        velocity = first + sum(guidance * (first - other) for other in rest)
        latent = latent + (then - now) * velocity
    return latent


def apart(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@SESSIONS
@pytest.mark.parametrize("change", [made_anew, travels])
def test_conditions_that_are_new_at_every_call(change, session):
    text, model = prompt(), toy(plan=PLAN)
    dense = toy(quality="dense")
    with entered(session, model):
        found = draw(model, lambda i: [change(text, i)])
    expected = draw(dense, lambda i: [change(text, i)])
    stats = sd.stats(model)
    # the first change is news, and computed
    assert (stats.dense, stats.skipped) in [(10, 18), (11, 17)]
    assert sum(stats.fallbacks.values()) == stats.dense - 10
    assert apart(found, expected) < 1e-2
    if change is made_anew:
        standing = toy(plan=PLAN)
        with entered(session, standing):
            torch.testing.assert_close(draw(standing, lambda i: [text]), found, rtol=0, atol=0)


@SESSIONS
@pytest.mark.parametrize("change", [made_anew, travels])
def test_guidance_in_two_calls_of_new_conditions(change, session):
    texts, model, dense = (prompt(0), prompt(1)), toy(), toy(quality="dense")
    with entered(session, model):
        found = draw(model, lambda i: [change(text, i) for text in texts], guidance=2.0)
    stats = sd.stats(model)
    assert stats.evaluations == 2 * STEPS and stats.skipped >= 2 * 16
    if change is made_anew:
        standing = toy()
        with entered(session, standing):
            expected = draw(standing, lambda i: texts, guidance=2.0)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    else:
        expected = draw(dense, lambda i: [change(text, i) for text in texts], guidance=2.0)
        assert apart(found, expected) < 0.1


@SESSIONS
def test_a_prompt_that_is_swapped_is_computed_at_once(session):
    first, second, model = prompt(0), prompt(1), toy()
    swap, handed = 12, []  # a step that the plan would skip

    def conditions(index):
        return [first if index < swap else second]

    latent, levels = noise(), sigmas(STEPS)
    with entered(session, model):
        for index, (now, then) in enumerate(itertools.pairwise(levels)):
            time, (text,) = torch.tensor([now]), conditions(index)
            velocity = model(latent, time, text)
            handed.append(apart(velocity, dense_velocity(model, latent, time, text)))
            latent = latent + (then - now) * velocity
    assert handed[swap] < 1e-6
    # what was computed for the other prompt is no ground for forecasts
    time = torch.tensor([levels[swap]])
    stale = apart(*(dense_velocity(model, latent, time, text) for text in (first, second)))
    assert max(handed[swap : swap + 3]) < stale / 5
    assert sd.stats(model).skipped >= 16
    assert sd.stats(model).fallbacks in ({"a condition changed": 1}, {})


def test_two_generations_in_turns_whose_conditions_are_made_anew():
    model, dense = toy(plan=PLAN), toy(quality="dense")
    runs = []
    for each in (model, dense):
        latents, levels = [noise(0), noise(1)], sigmas(STEPS)
        for now, then in itertools.pairwise(levels):
            for user in range(2):
                text = made_anew(prompt(user), 0)
                velocity = each(latents[user], torch.tensor([now]), text)
                latents[user] = latents[user] + (then - now) * velocity
        runs.append(latents)
    assert sd.stats(model).skipped == 2 * 18
    for found, expected in zip(*runs, strict=True):
        assert apart(found, expected) < 2e-2


def test_a_second_generation_begins_anew():
    model, text = toy(), prompt()
    first = draw(model, lambda i: [travels(text, i)], seed=3)
    again = draw(model, lambda i: [travels(text, i)], seed=3)
    torch.testing.assert_close(first, again, rtol=0, atol=0)


def test_another_latent_under_other_conditions_is_not_followed():
    """Somebody else's first call, at a time that would go on."""
    model = toy()
    draw(model, lambda i: [made_anew(prompt(), i)], steps=10)
    stats = sd.stats(model)
    latent, time, text = noise(7), torch.tensor([0.05]), prompt(7)
    velocity = model(latent, time, text)
    torch.testing.assert_close(velocity, dense_velocity(model, latent, time, text))
    assert sd.stats(model).dense == stats.dense + 1


def test_an_idle_model_says_so(caplog):
    """New conditions, and a sampler whose noise hides where the latent came from."""
    model = toy()
    for index, now in enumerate(sigmas(STEPS)[:-1]):
        model(noise(index), torch.tensor([now]), travels(prompt(), index))
    assert sd.stats(model).skipped == 0
    (said,) = [message for message in caplog.messages if "no generation is recognised" in message]
    assert "specdiff.session(model)" in said


@pytest.mark.parametrize("unit", [1, 1000])
def test_a_prompt_written_in_place_goes_on(unit):
    model, text = toy(programs=ToyPrograms(unit=unit)), prompt()
    latent, levels = noise(), sigmas(STEPS)
    for now, then in itertools.pairwise(levels):
        velocity = model(latent, torch.tensor([now * unit]), text)
        latent = latent + (then - now) * velocity
        text.mul_(1.01)
    assert sd.stats(model).skipped >= 16
