"""Batches of other sizes, which Dynamo makes symbolic from the second on."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import specdiff
from specdiff.settings import QUALITIES

STEPS = 28


class Tokenless(nn.Module):
    """A velocity without attention, in whose graph no node reads the batch's size."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        sigma = timestep.reshape(-1, 1, 1)
        return torch.sin(self.mix(hidden_states) + condition + 2 * sigma)


@torch.no_grad()
def drawn(model: nn.Module, batch: int) -> Tensor:
    """Euler on a flow."""
    generator = torch.Generator().manual_seed(batch)
    latent = torch.randn(batch, 6, 8, generator=generator)
    condition = torch.randn(batch, 1, 8, generator=generator)
    times = torch.linspace(1, 0, STEPS + 1)
    for now, then in pairwise(times):
        latent = latent + (then - now) * model(latent, now.expand(batch), condition)
    return latent


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("attached", [False, True])
def test_each_size_is_as_the_model_and_has_a_step_plan(dynamic, attached):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, sizes = Tokenless(), [1, 2, 3, 4, 2]
    expected = [drawn(model, batch) for batch in sizes]
    model.compile(backend="specdiff", dynamic=dynamic, options={"inner_backend": "eager"})
    if attached:
        specdiff.attach(model)
    for batch, exact in zip(sizes, expected, strict=True):
        before = specdiff.stats(model).skipped if batch > 1 else 0
        error = (drawn(model, batch) - exact).norm() / exact.norm()
        assert error.item() < 5e-3
        assert specdiff.stats(model).skipped - before == STEPS - len(QUALITIES["balanced"].dense)
    assert not specdiff.stats(model).fallbacks
