"""Latents that take turns under one prompt tensor: tiles, seeds drawn side by side."""

import itertools

import pytest
import torch

import specdiff as sd
from specdiff.plan import Plan
from specdiff.runtime.streams.table import MAX_STREAMS
from tests.helpers import PLAN, step_counts
from tests.runtime.toy import SIDE, Euler, dense_velocity, noise, prompt, sigmas, toy


def runs_of(model, text, latents, time=lambda index: 0.6 - index / 20, steps=12):
    runs = [Euler(model, text=text) for _ in latents]
    for run, latent in zip(runs, latents, strict=True):
        run.latent, run.sigmas = latent, [time(index) for index in range(steps + 1)]
    return runs


def alone(latent, **options):
    (run,) = runs_of(toy(**PLAN), prompt(), [latent], **options)
    return run.run().velocities


def alike(count, likeness):
    """Latents of unit variance that differ by a share of it, as images made of one do."""
    return [noise(0) + likeness * noise(seed) for seed in range(1, count + 1)]


@pytest.mark.parametrize("order", [1, -1], ids=["in order", "every other round reversed"])
@pytest.mark.parametrize("likeness", [0.1, 0.3, 1.0])
def test_each_lane_is_drawn_as_if_it_were_alone(likeness, order):
    model, latents = toy(**PLAN), alike(3, likeness)
    runs = runs_of(model, prompt_kept := prompt(), latents)
    for index in range(12):
        for run in runs[:: order if index % 2 else 1]:
            run.step()
    for run, latent in zip(runs, latents, strict=True):
        torch.testing.assert_close(run.velocities, alone(latent), rtol=0, atol=0)
    assert sd.stats(model).fallbacks == {}
    del prompt_kept


def test_lanes_begin_again_with_the_next_generation():
    model, text = toy(**PLAN), prompt()
    for count in (2, 3, 1):
        latents = alike(count, 1.0)
        runs = runs_of(model, text, latents)
        for _ in range(12):
            for run in runs:
                run.step()
        for run, latent in zip(runs, latents, strict=True):
            torch.testing.assert_close(run.velocities, alone(latent), rtol=0, atol=0)


def tiled(call, text, steps=16):
    """Two tiles of one wide latent, half of each shared: their velocities are averaged there."""
    latent = torch.cat([noise(1), noise(2)], -1)[..., : SIDE + SIDE // 2]
    times = sigmas(steps)
    for now, later in itertools.pairwise(times):
        velocity, count = torch.zeros_like(latent), torch.zeros_like(latent)
        for start in (0, SIDE // 2):
            place = ..., slice(start, start + SIDE)
            velocity[place] += call(latent[place].clone(), torch.tensor([now]), text)
            count[place] += 1
        latent = latent + (later - now) * velocity / count
    return latent


def test_tiles_that_overlap():
    plan = Plan.of(28, (0, 2, 4, 7, 10, 14, 18, 22, 26, 27))
    model, text = toy(plan=plan), prompt()
    exact = tiled(lambda *given: dense_velocity(model, *given), text)
    fewer = tiled(lambda *given: dense_velocity(model, *given), text, steps=8)
    drawn = tiled(model, text)
    dense, _, skipped = step_counts(model)
    assert skipped >= dense
    assert sd.stats(model).fallbacks == {}
    assert (drawn - exact).norm() < (fewer - exact).norm() / 2


def test_more_lanes_than_are_kept_run_dense():
    model, text = toy(**PLAN), prompt()
    runs = runs_of(model, text, alike(MAX_STREAMS + 1, 1.0), steps=4)
    for _ in range(4):
        for run in runs:
            run.step()
    assert max(max(run.errors) for run in runs) < 1e-6
    assert sd.stats(model).fallbacks == {"ambiguous stream": 3 * len(runs)}


def test_calls_at_one_time_before_a_generation_do_not_matter():
    model, text = toy(**PLAN), prompt()
    for latent in alike(3 * MAX_STREAMS, 1.0):
        model(latent, torch.tensor([0.6]), text)
    (run,) = runs_of(model, text, [noise(7)])
    torch.testing.assert_close(run.run().velocities, alone(noise(7)), rtol=0, atol=0)
