"""A generation that goes on in another graph keeps its place in the plan and what was computed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import specdiff
from specdiff.runtime.step.step import CONTINUED
from specdiff.runtime.tokens.history import History
from specdiff.settings import QUALITIES
from tests.runtime.blocks.test_row_times import times_of as apart
from tests.runtime.blocks.test_whole_steps import DENSE as PLANNED
from tests.runtime.blocks.test_whole_steps import STEPS, Denoiser

SCALE = 2.0
PLAN = QUALITIES["balanced"]
"""Given, so that it is followed as it is."""

Guided = Callable[[float], bool]
"""Whether a step is guided, in one batch, by the share of steps before it."""


class Velocity(Denoiser):
    """[B, 6, 8] of latent, time and condition."""

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, condition: Tensor, skip: bool = False
    ) -> Tensor:
        velocity = self.velocity(hidden_states, timestep, condition)
        return 0.9 * velocity if skip else velocity


def times_of(steps: int) -> Tensor:
    return apart([1.0], steps)[:, 0]


@torch.no_grad()
def drawn(
    model: nn.Module,
    guided: Guided,
    seed: int = 1,
    skip: Guided = lambda share: False,
    steps: int = STEPS,
) -> Tensor:
    """Euler on a flow; where a step is guided the batch holds both halves, the conditional last."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(1, 6, 8, generator=generator)
    one = torch.randn(1, 1, 8, generator=generator)
    both = torch.cat([torch.zeros_like(one), one])
    for step, (now, then) in enumerate(pairwise(times_of(steps))):
        share = step / steps
        if guided(share):
            pair = model(torch.cat([latent, latent]), now.expand(2), both, skip=skip(share))
            velocity = pair[:1] + SCALE * (pair[1:] - pair[:1])
        else:
            velocity = model(latent, now.expand(1), one, skip=skip(share))
        latent = latent + (then - now) * velocity
    return latent


KINDS: dict[str, tuple[Guided, Guided, int]] = {
    "guidance ends": (lambda share: share < 0.4, lambda share: False, 1),
    "guidance begins": (lambda share: share >= 0.4, lambda share: False, 1),
    "guidance in between": (lambda share: 0.2 <= share < 0.7, lambda share: False, 2),
    "layers skipped in between": (lambda share: True, lambda share: 0.2 <= share < 0.7, 2),
}


@pytest.mark.parametrize("timed", [False, True], ids=["read", "given"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_goes_on(kind, timed):
    """Each switch costs one evaluation at most; closer than as many dense steps."""
    guided, skip, switches = KINDS[kind]
    model = Velocity()
    expected = drawn(model, guided, skip=skip)
    specdiff.attach(model, plan=PLAN)
    session = specdiff.session(model, timesteps=times_of(STEPS)[:-1]) if timed else nullcontext()
    with session:
        found = drawn(model, guided, skip=skip)
    stats = specdiff.stats(model)
    assert PLANNED <= stats.dense <= PLANNED + switches + 1
    assert set(stats.fallbacks) <= {CONTINUED}
    fewer = drawn(Velocity(), guided, skip=skip, steps=stats.dense)
    assert (found - expected).norm() < 0.7 * (fewer - expected).norm()


def test_generations_of_other_latents_do_not_go_on_in_each_other():
    """One guided, one not, taking turns: each has its own plan."""
    model = Velocity()
    specdiff.attach(model, plan=PLAN)
    alone = [drawn(model, lambda share: True, 1), drawn(model, lambda share: False, 2)]
    before = specdiff.stats(model).dense
    specdiff.reset(model)
    first = drawn(model, lambda share: True, 1)
    second = drawn(model, lambda share: False, 2)
    assert torch.equal(first, alone[0]) and torch.equal(second, alone[1])
    assert specdiff.stats(model).dense == before == 2 * PLANNED


def straight() -> list[Tensor]:
    """Of two rows at three times, on a line."""
    start, slope = torch.randn(2, 2, 3, 4)
    return [start, start + slope, start + 2 * slope]


@pytest.mark.parametrize("half", [0, 1])
def test_what_was_computed_of_the_half_that_goes_on_is_kept(half):
    pair, single = History(2, 3, torch.device("cpu")), History(1, 3, torch.device("cpu"))
    outputs = straight()
    for time, output in zip((9.0, 8.0), outputs, strict=False):
        pair.record_dense(time, output)
    single.inherit(pair)
    assert not single.computed  # which half is not known yet
    single.record_dense(7.0, outputs[2][half : half + 1] + 0.1)
    assert single.leads_on
    assert [output.times for output in single.computed] == [7.0, 8.0, 9.0]
    assert torch.equal(single.computed[1].tokens, outputs[1][half : half + 1])
    assert torch.equal(single.computed[2].tokens, outputs[0][half : half + 1])


def test_what_another_function_computed_is_left_behind():
    """As where an adapter is switched on: two outputs of its own are needed for a line."""
    one, other = History(2, 3, torch.device("cpu")), History(2, 3, torch.device("cpu"))
    before = straight()
    one.record_dense(9.0, before[0])
    one.record_dense(8.0, before[1])
    other.inherit(one)
    for time, leads_on in ((7.0, False), (6.0, True)):
        other.record_dense(time, before[2] + 5 + time)
        assert other.leads_on is leads_on
    assert [output.times for output in other.computed] == [6.0, 7.0]


def test_what_other_rows_computed_is_left_behind():
    one, pair = History(1, 3, torch.device("cpu")), History(2, 3, torch.device("cpu"))
    one.record_dense(9.0, torch.randn(1, 3, 4))
    pair.inherit(one)
    pair.record_dense(8.0, torch.randn(2, 3, 4))
    assert len(pair.computed) == 1


@torch.no_grad()
def drawn_in_two_calls(model: nn.Module, begins: float, steps: int = STEPS) -> Tensor:
    """Guidance in calls of its own, that begins on the way."""
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(1, 6, 8, generator=generator)
    one = torch.randn(1, 1, 8, generator=generator)
    none = torch.zeros_like(one)
    for step, (now, then) in enumerate(pairwise(times_of(steps))):
        velocity = model(latent, now.expand(1), one)
        if step / steps >= begins:
            other = model(latent, now.expand(1), none)
            velocity = other + SCALE * (velocity - other)
        latent = latent + (then - now) * velocity
    return latent


@pytest.mark.parametrize("timed", [False, True], ids=["read", "given"])
def test_a_half_of_guidance_that_begins_falls_in_with_the_other(timed):
    """Both are computed at the same evaluations, as guidance multiplies what one lacks."""
    model = Velocity()
    expected = drawn_in_two_calls(model, 0.5)
    specdiff.attach(model)
    session = specdiff.session(model, timesteps=times_of(STEPS)[:-1]) if timed else nullcontext()
    with session, specdiff.record(model) as recording:
        found = drawn_in_two_calls(model, 0.5)
    late = [step.kind for step in recording.steps[STEPS // 2 :]]
    first, second = late[::2], late[1::2]
    assert first[1:] == second[1:] and "skipped" in first
    fewer = drawn_in_two_calls(Velocity(), 0.5, steps=PLANNED + 1)
    assert (found - expected).norm() < (fewer - expected).norm()
