"""Whatever the sampler, no picture is destroyed: properties, by samplers drawn at random."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import specdiff
from specdiff.runtime.records.stats import Stats
from tests.runtime.random_samplers import AsScheduler, Flow, Sampler, drawn

FINE = 30.0
"""dB from which on it does not matter that fewer steps of a smooth flow are closer still."""
POOR = 15.0
"""dB that a sampler keeps of which too little is told."""

SAMPLERS = st.builds(
    Sampler,
    steps=st.sampled_from([10, 12, 16, 20, 24, 28, 40, 50]),
    shift=st.sampled_from([1.0, 3.0, 6.0]),
    rho=st.sampled_from([1.0, 3.0, 7.0]),
    order=st.sampled_from([1, 2, 3]),
    fresh=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    noisy=st.sampled_from([(0.0, 1.0), (0.3, 0.7)]),
    kept=st.sampled_from([0, 2, 5]),
    kicked=st.sampled_from([None, 0.3, 0.6]),
    told=st.sampled_from(["nothing", "session", "times", "scheduler"]),
)


def psnr(found: Tensor, exact: Tensor) -> float:
    """dB, of pictures from -1 to 1."""
    return -10 * math.log10((found - exact).square().mean().item() / 4 + 1e-12)


def accelerated(sampler: Sampler, seed: int) -> tuple[Tensor, Stats]:
    """A picture, and what was computed for it."""
    model = Flow()
    specdiff.attach(model)
    told = {
        "session": {},
        "times": {"timesteps": sampler.sigmas()[:-1]},
        "scheduler": {"scheduler": AsScheduler(sampler)},
    }
    known = told.get(sampler.told)
    with nullcontext() if known is None else specdiff.session(model, **known):
        found = drawn(model, sampler, seed)
    return found, specdiff.stats(model)


def check(sampler: Sampler, seed: int) -> None:
    """Dense to the bit, or at most 1 dB behind as many dense steps, or fine all the same.

    Fewer steps are moved by a callback at another time: 3 dB. A sampler of which too little is
    told, of higher order or of uneven times, keeps a picture, though fewer steps may be closer.
    Where the times are given nothing waits for what a step shows: a callback may be seen late.
    """
    assume(sampler.kicked is None or sampler.told != "times")
    exact = drawn(Flow(), sampler, seed)
    found, stats = accelerated(sampler, seed)
    if stats.dense == sampler.steps:
        assert (found - exact).abs().max() < 1e-5
        return
    kept = psnr(found, exact)
    behind = psnr(drawn(Flow(), replace(sampler, steps=stats.dense), seed), exact) - kept
    enough = FINE if sampler.is_known else POOR
    assert kept > enough or behind < (1 if sampler.kicked is None else 3), (sampler, seed, stats)


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(SAMPLERS, st.integers(0, 4))
def test_no_sampler_destroys_a_picture(sampler: Sampler, seed: int) -> None:
    check(sampler, seed)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(SAMPLERS, st.integers(0, 4))
def test_of_many_samplers_none_destroys_a_picture(sampler: Sampler, seed: int) -> None:
    check(sampler, seed)
