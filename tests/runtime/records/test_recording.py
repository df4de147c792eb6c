"""Recordings: what each evaluation did, at no cost to what it does."""

from __future__ import annotations

import json

import pytest
import torch

import specdiff
from specdiff.plan import Plan
from specdiff.runtime.records.recording import COMPUTED, FORECAST, REUSED
from tests.helpers import PLAN
from tests.runtime.test_api import NoReadback
from tests.runtime.toy import Euler, N, ToyPrograms, noise, prompt, toy

LISTED = {"plan": Plan((0, 0, 0, 1, 0.75, 1, 0, 1, 0.75, 1))}
PAPER = {"method": "paper", "cache_ratio": 0.75}


def recorded(**options):
    model = toy(**options)
    with specdiff.record(model) as recording:
        Euler(model).run()
    return model, recording


def test_every_step_with_its_kind_share_and_reason():
    model, recording = recorded(**LISTED)
    kinds = [(step.kind, step.active_share) for step in recording.steps]
    dense, selective, skipped = ("dense", 1.0), ("selective", 0.25), ("skipped", 0.0)
    between = [skipped, selective, skipped]
    assert kinds == [*[dense] * 3, *between, dense, *between]
    reasons = [f"the plan's evaluation {number} of 10" for number in range(1, 11)]
    assert [step.reason for step in recording.steps] == reasons
    assert [step.index for step in recording.steps] == list(range(10))
    assert [step.time for step in recording.steps] == pytest.approx(Euler(model).sigmas[:-1])
    assert [step.speculative for step in recording.steps] == [0, 1] + [0] * 8
    assert all(step.seconds > 0 for step in recording.steps)
    computed = sum(step.active_share * N for step in recording.steps)
    assert computed + N == specdiff.stats(model).tokens_computed  # and one look ahead


@pytest.mark.parametrize(
    ("ratio", "kind", "why"),
    [
        (0.75, "selective", "the 4 highest scores"),
        (1.0, "skipped", "forecast from earlier steps"),
        (0.0, "dense", "no token may be left out"),
    ],
)
def test_every_step_of_a_rule_with_its_reason(ratio, kind, why):
    _, recording = recorded(**{**PLAN, "cache_ratio": ratio})
    gap = [(kind, why)] * 3
    every = ("dense", "dense every 4")
    expected = [*[("dense", "warm-up")] * 3, *gap, every, *gap]
    assert [(step.kind, step.reason) for step in recording.steps] == expected


def test_classes_are_what_the_paper_calls_them():
    model, recording = recorded(**PAPER, plan=Plan.warmup(3, lookahead=0))
    dense, *_, last = recording.steps
    assert (dense.classes() == COMPUTED).all()
    found = last.classes()
    assert found.shape == (1, N)
    assert found.flatten().bincount(minlength=4)[COMPUTED] == N // 4
    assert set(found.flatten().tolist()) == {COMPUTED, REUSED, FORECAST}
    (calls,) = [active for name, active in model.runtime.programs.calls[-1:]]
    assert torch.equal((found == COMPUTED).nonzero()[:, 1], calls.flatten())
    assert (skipped_classes() == FORECAST).all()


def skipped_classes():
    _, recording = recorded(cache_ratio=1.0)
    return next(step for step in recording.steps if step.kind == "skipped").classes()


def test_scores_say_how_much_the_chosen_tokens_hold():
    _, recording = recorded(**PAPER)
    last = recording.steps[-1]
    best = last.scores.softmax(1).sort(descending=True).values[0, : N // 4].sum().item()
    assert last.held_by_active() == pytest.approx(best)
    text = json.dumps(recording.to_json(), allow_nan=False)
    first, *_, step = json.loads(text)
    assert (
        step["log_score"]["lowest"] <= step["log_score"]["median"] <= step["log_score"]["highest"]
    )
    assert first["log_score"] is None and first["importance"]["highest"] > 0


def test_recording_changes_no_output():
    plain, watched = toy(**LISTED), toy(**LISTED)
    with specdiff.record(watched):
        seen = Euler(watched).run().velocities
    for one, other in zip(Euler(plain).run().velocities, seen, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", [LISTED, PAPER], ids=["history", "paper"])
def test_nothing_is_read_from_the_device_while_recording(options):
    model = toy(**options)
    run = Euler(model)
    with specdiff.session(model, run.sigmas[:-1]), specdiff.record(model) as recording:
        latent = run.latent
        for index in range(10):
            time = run.time(index)
            with NoReadback():
                latent = latent + 0.05 * model(latent, time, run.prompt)
    assert len(recording.steps) == 10


def test_fallbacks_have_their_guard_as_reason():
    model = toy(programs=ToyPrograms(time=False))
    with specdiff.record(model) as recording:
        Euler(model).run(1)
    (step,) = recording.steps
    assert (step.kind, step.reason, step.active_share) == ("fallback", "no time input", 1.0)
    assert step.generation is None and recording.generations() == []
    model = toy(**LISTED)
    with specdiff.record(model) as recording:
        model(noise() * torch.nan, torch.ones(1), prompt())
    assert recording.steps[0].reason == "latent is not finite"


def test_generations_are_told_apart():
    model = toy(**LISTED)
    with specdiff.record(model) as recording:
        Euler(model, 0).run()
        Euler(model, 1).run(4)
    assert [len(steps) for steps in recording.generations()] == [10, 4]


def test_only_what_runs_inside_is_kept():
    model = toy(**LISTED)
    run = Euler(model).run(2)
    with specdiff.record(model) as outer:
        run.run(1)
        with specdiff.record(model) as inner:
            run.run(2)
    run.run(1)
    assert (len(outer.steps), len(inner.steps)) == (3, 2)
    assert "selective" in str(inner) and "1 looked ahead" not in str(inner)
    assert not model.runtime._nameless.recordings


def test_a_recording_keeps_no_caches_alive():
    model = toy(**LISTED)
    with specdiff.record(model) as recording:
        Euler(model).run()
    specdiff.reset(model)
    assert model.runtime.pool.nbytes == 0
    assert len(recording.steps) == 10


def test_a_module_without_parameters_is_refused():
    with pytest.raises(specdiff.NotCompiledError, match="no parameters"):
        specdiff.record(torch.nn.Identity())
