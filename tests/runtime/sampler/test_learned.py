"""Exact times of rounded ones, by the steps between them."""

import itertools

import pytest
import torch

from specdiff.runtime.sampler.learned import MOST_RUNS, LearnedTimes, exact_times
from tests.runtime.toy import sigmas

EPS = torch.finfo(torch.bfloat16).eps


def rounded(times):
    return torch.tensor(times).bfloat16().tolist()


@pytest.mark.parametrize("first", [0, 7])
def test_exact_times_come_back(first):
    times = sigmas(28)[first:-1]
    steps = [b - a for a, b in itertools.pairwise(times)]
    found = exact_times(rounded(times), steps, EPS)
    error, before = (
        max(abs(a - b) for a, b in zip(times, o, strict=True)) for o in (found, rounded(times))
    )
    assert error < 3e-4 < 1e-3 < before


def test_steps_that_lead_elsewhere_tell_no_times():
    times = sigmas(28)[:-1]
    steps = [0.9 * (b - a) for a, b in itertools.pairwise(times)]
    assert exact_times(rounded(times), steps, EPS) is None


def test_the_latest_run_that_began_so_is_found():
    known = LearnedTimes()
    known.keep((1.0, 0.5), (1.0, 0.51))
    assert known.find((1.0,)) == (1.0, 0.51)
    known.keep((1.0, 0.5, 0.25), (1.0, 0.51, 0.26))  # it had not ended
    known.keep((1.0, 0.75), (1.0, 0.74))
    assert known.find((1.0,)) == (1.0, 0.74)
    assert known.find((1.0, 0.5)) == (1.0, 0.51, 0.26)
    assert known.find((1.0, 0.25)) is None


def test_not_every_run_is_kept():
    known = LearnedTimes()
    for run in range(MOST_RUNS + 1):
        known.keep((float(run),), (float(run),))
    assert known.find((0.0,)) is None and known.find((1.0,)) == (1.0,)
