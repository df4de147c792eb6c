"""What a skipped step costs the host, and what is kept from one step to the next."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import specdiff
from tests.helpers import with_ops

STEPS = 28
MOST_OPS = 20
"""Of a skipped step, from the fifth evaluation on: before, the sampler is being fitted."""
TIMES = torch.linspace(1, 0, STEPS + 1).tolist()
DENSE = len(specdiff.Options(quality="balanced").resolve().plan.dense)


class Denoiser(nn.Module):
    """Its outputs lie in the same memory at every call, as those of a CUDA graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Linear(8, 8)
        self.outputs: list[Tensor] = []

    def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Tensor) -> Any:
        rows = timestep.to(hidden_states.dtype).reshape(-1, 1, 1)
        found = torch.sin(self.mix(hidden_states) + condition + 2 * rows)
        if not self.outputs:
            self.outputs = [torch.empty_like(found), torch.empty_like(found)]
        self.outputs[0].copy_(found)
        self.outputs[1].copy_(found + 1)
        return tuple(self.outputs)


def inputs(batch: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(1)
    latent = torch.randn(batch, 6, 8, generator=made).to(dtype)
    return latent, torch.randn(batch, 1, 8, generator=made).to(dtype)


@torch.no_grad()
def drawn(model: nn.Module, overwrite: bool = False, edit: Any = None) -> Tensor:
    """Euler on a flow; the caller may reuse the memory of all that it gave and got."""
    latent, condition = inputs()
    given, time = latent.clone(), torch.empty(1)
    with specdiff.session(model, timesteps=TIMES[:-1]):
        for index, (now, then) in enumerate(pairwise(TIMES)):
            given.copy_(latent)
            time.fill_(now)
            outputs = model(given if overwrite else latent, time, condition)
            latent = latent + (then - now) * outputs[0]
            if edit is not None:
                latent = edit(index, latent)
            if overwrite:
                for tensor in (given, *outputs):
                    tensor.fill_(torch.nan)
    return latent


@pytest.mark.parametrize(
    ("batch", "dtype", "most"),
    [
        (1, torch.float32, MOST_OPS),
        (4, torch.float32, MOST_OPS),
        (1, torch.bfloat16, MOST_OPS + 4),  # cast to be compared
    ],
)
@torch.no_grad()
def test_a_skipped_step_of_a_session_with_times_is_few_ops(batch, dtype, most):
    model = Denoiser().to(dtype)
    specdiff.attach(model)
    (latent, condition), ops = inputs(batch, dtype), []
    with specdiff.session(model, timesteps=TIMES[:-1]):
        for now, then in pairwise(TIMES):
            before = specdiff.stats(model).skipped if ops else 0
            time = torch.full((batch,), now)
            (velocity, _), found = with_ops(lambda: model(latent, time, condition))  # noqa: B023
            ops.append(found if specdiff.stats(model).skipped > before else [])
            latent = latent + (then - now) * velocity
    assert sum(map(bool, ops)) == STEPS - DENSE
    assert max(map(len, ops[4:])) <= most


def test_what_is_kept_survives_whoever_writes_where_it_came_from():
    results = []
    for overwrite in (False, True):
        model = Denoiser()
        specdiff.attach(model)
        results.append(drawn(model, overwrite))
        stats = specdiff.stats(model)
        assert (stats.skipped, stats.fallbacks) == (STEPS - DENSE, {})
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("first", range(6, 22, 3))
@pytest.mark.parametrize("lasts", [1, STEPS])
def test_a_latent_that_somebody_moves_ends_forecasts_two_evaluations_later(first, lasts):
    """After many steps that went where they were known to go."""
    model = Denoiser()
    specdiff.attach(model)
    torch.manual_seed(2)

    def edit(index: int, latent: Tensor) -> Tensor:
        return latent + 0.1 * torch.randn_like(latent) * (first <= index < first + lasts)

    with specdiff.record(model) as recording:
        drawn(model, edit=edit)
    # the evaluation after the step is the first to see it
    strayed = [step.index for step in recording.steps if step.reason == "unexplained step"]
    kinds = [step.kind for step in recording.steps]
    assert kinds[first + 3] == "dense"
    assert all(index >= first + 3 for index in strayed)
    if lasts > 1:
        assert kinds[first + 3 :] == ["dense"] * (STEPS - first - 3)


def test_a_sampler_of_higher_order_is_no_noise_though_its_first_step_is_euler():
    """Its second step is not where the first one led to, but predictions explain it."""
    model, (latent, condition) = Denoiser(), inputs()
    specdiff.attach(model)
    older = None
    with torch.no_grad(), specdiff.session(model, timesteps=TIMES[:-1]):
        for index, (now, then) in enumerate(pairwise(TIMES)):
            velocity = model(latent, torch.tensor([now]), condition)[0]
            slope = 0.5 * (velocity - older) if index > 4 else 0
            latent, older = latent + (then - now) * (velocity + slope), velocity
    stats = specdiff.stats(model)
    assert (stats.skipped, stats.fallbacks) == (STEPS - DENSE, {})


@torch.no_grad()
def test_a_first_frame_that_is_given_costs_a_skipped_step_no_search():
    """No prediction moves it, so that steps are known by the rest alone."""
    model, (latent, condition) = Denoiser(), inputs()
    specdiff.attach(model)
    first, ops = latent[:, :2], []
    with specdiff.session(model, timesteps=TIMES[:-1]):
        for now, then in pairwise(TIMES):
            before, time = specdiff.stats(model).skipped if ops else 0, torch.tensor([now])
            (velocity, _), found = with_ops(lambda: model(latent, time, condition))  # noqa: B023
            ops.append(found if specdiff.stats(model).skipped > before else [])
            latent = latent + (then - now) * velocity
            latent[:, :2] = first
    assert sum(map(bool, ops)) == STEPS - DENSE
    assert max(map(len, ops[9:])) <= MOST_OPS + 2
