"""The scale of guidance in a batch, learned where nobody told it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import specdiff
from specdiff.plan import Plan
from specdiff.runtime.sampler.remains import Seen
from specdiff.runtime.sampler.scale import UNSURE, LearnedScale, scale_shown

STEPS = 28
TIMES = [3 * s / (1 + 2 * s) for s in torch.linspace(1, 0, STEPS + 1).tolist()]


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step(weights: tuple[float, float, float], dtype: torch.dtype, pictures: int = 1) -> Any:
    """[2B, 4096] latents and the evaluation before: `weights` of latent and both halves."""
    half = noise(pictures, 4096, seed=1)
    first = noise(pictures, 4096, seed=2)
    second = first + 0.1 * noise(pictures, 4096, seed=3)
    kept, one, other = weights
    now = kept * half + one * first + other * second
    latents = torch.cat([half, half]).to(dtype)
    seen = Seen(1.0, (latents,), ((torch.cat([first, second]),),))
    return [torch.cat([now, now]).to(dtype)], seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pictures", [1, 3])
@pytest.mark.parametrize("kept", [1.0, 0.9])
@pytest.mark.parametrize("scale", [7.0, 1.5, -6.0])  # with the conditional half first: 1 - g
def test_a_guided_step_shows_the_scale(scale, kept, pictures, dtype):
    latents, seen = step((kept, -0.2 * (1 - scale), -0.2 * scale), dtype, pictures)
    pairs, found, unsure = scale_shown(latents, seen, 2 * pictures).tolist()
    assert pairs and unsure < UNSURE
    assert found == pytest.approx(scale, rel=1e-3 if dtype is torch.float32 else 0.02)


def test_pictures_of_their_own_have_none():
    latents, seen = noise(2, 4096, seed=1), noise(2, 4096, seed=2)
    pairs, _, _ = scale_shown([latents], Seen(1.0, (seen,), ((noise(2, 4096, seed=3),),)), 2)
    assert not pairs


def test_what_something_else_moved_shows_none():
    """Fresh noise, or a third prediction."""
    (now,), seen = step((1.0, 1.2, -1.4), torch.float32)
    now = now + 0.1 * noise(1, 4096, seed=8)
    _, _, unsure = scale_shown([now], seen, 2).tolist()
    assert unsure > UNSURE


def test_halves_that_are_alike_show_none():
    latents = noise(1, 4096, seed=1).repeat(2, 1)
    predictions = noise(1, 4096, seed=2).repeat(2, 1)
    seen = Seen(1.0, (latents,), ((predictions,),))
    _, _, unsure = scale_shown([latents - 0.2 * predictions], seen, 2).tolist()
    assert unsure > UNSURE


class Guided(nn.Module):
    """A smooth flow, and what a condition adds."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        wave = torch.sin(3 * timestep.reshape(-1, 1, 1) + condition)
        return 0.5 * wave + 0.3 * torch.tanh(self.mix(hidden_states))


@torch.no_grad()
def drawn(given: bool, rows: list[int], last: float = 4.0, **options: Any) -> Tensor:
    """A guided picture; `rows`: the unconditional half, and the other; `last`: scale at the end."""
    torch.manual_seed(0)
    model = Guided()
    latent, conditions = torch.randn(1, 16, 8), torch.randn(2, 16, 8)[rows]
    specdiff.attach(model, **options)
    with specdiff.session(model, timesteps=TIMES[:-1] if given else None):
        for now, then in pairwise(TIMES):
            both = torch.cat([latent, latent])
            found = model(both, torch.full((2,), now), conditions)
            scale = last + (4 - last) * now
            latent = latent + (then - now) * torch.lerp(found[rows[0]], found[rows[1]], scale)
    return latent


# The first are dense, so that nothing is forecast before the scale is known.
PLAN = Plan.of(STEPS, (0, 1, 2, 3, 4, 6, 9, 12, 15, 18, 21, 24, 26, 27))


@pytest.mark.parametrize("rows", [[0, 1], [1, 0]])
@pytest.mark.parametrize(
    ("given", "target"), [(False, "dense"), (True, "dense"), (False, "solution")]
)
def test_a_learned_scale_is_as_good_as_a_told_one(target, given, rows):
    told, learned = (
        drawn(given, rows, plan=PLAN, target=target, guidance_scale=scale) for scale in (4.0, None)
    )
    dense = drawn(given, rows, quality="dense")
    assert (learned - told).norm() < 0.05 * (told - dense).norm()


@pytest.mark.parametrize("given", [False, True])
def test_a_scale_that_changes_is_not_taken_for_one_that_stays(given, monkeypatch):
    """Trust goes on judging by how the last step was mixed, and the picture is no worse for it."""
    dense = drawn(given, [0, 1], last=20.0, quality="dense")
    learned = drawn(given, [0, 1], last=20.0)
    monkeypatch.setattr(LearnedScale, "look", lambda *of: False)
    left_alone = drawn(given, [0, 1], last=20.0)
    assert (learned - dense).norm() < 1.1 * (left_alone - dense).norm()
