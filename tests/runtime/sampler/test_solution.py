"""Against a closed form: data of one Gaussian, or of two, moved by its exact velocity."""

import itertools
import math

import pytest
import torch

from specdiff.runtime.sampler.solution import Solution

DATA = {
    "one": ((0.5,), (0.3,), (1.0,)),
    "two": ((-1.5, 1.0), (0.4, 0.3), (0.4, 0.6)),
}
"""Means, deviations and weights."""
PLANS = {
    "every step": lambda step: True,
    "two of three": lambda step: step % 3 != 2,
    "uneven": lambda step: step % 5 in (0, 1, 3),
}


class Mixture:
    """Numbers of a mixture of Gaussians under a flow: sigma of noise, 1 - sigma of data."""

    def __init__(self, means, deviations, weights):
        numbers = (torch.tensor(each) for each in (means, deviations, weights))
        self.means, self.deviations, self.weights = numbers

    def parts(self, sigma):
        spread = ((1 - sigma) ** 2 * self.deviations**2 + sigma**2).sqrt()
        return (1 - sigma) * self.means, spread

    def velocity(self, x, sigma):
        mean, spread = self.parts(sigma)
        apart = (x[..., None] - mean) / spread
        whose = torch.softmax((self.weights / spread).log() - apart**2 / 2, -1)
        widens = (sigma - (1 - sigma) * self.deviations**2) / spread
        return (whose * (widens * apart - self.means)).sum(-1)

    def below(self, x, sigma):
        mean, spread = self.parts(sigma)
        return (self.weights * torch.special.ndtr((x[..., None] - mean) / spread)).sum(-1)

    def solution(self, x):
        """Where the flow ends: in one dimension it keeps the share of numbers below."""
        share, low, high = self.below(x, 1.0), torch.full_like(x, -9), torch.full_like(x, 9)
        for _ in range(60):
            middle = (low + high) / 2
            left = self.below(middle, 0.0) < share
            low, high = torch.where(left, middle, low), torch.where(left, high, middle)
        return (low + high) / 2


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def error(data, steps, computed, integrates=True, sharing=None):
    """Mean distance from the solution after Euler's steps from sigma 1 to 0."""
    mixture, evenly = Mixture(*DATA[data]), torch.linspace(1, 0, steps + 1)
    times = (3 * evenly / (1 + 2 * evenly)).tolist()
    x = start = torch.randn(2, 200, generator=torch.Generator().manual_seed(0))
    known = Solution()
    for step, (here, there) in enumerate(itertools.pairwise(times)):
        value = mixture.velocity(x, here) if computed(step) else None
        handed = value
        if integrates:
            known.arrive(here, value)
            known.share = known.share if sharing is None else sharing
            handed = known.answer(here, there)
            known.hand(here, handed)
        x = x + (there - here) * handed
    return (x - mixture.solution(start)).abs().mean().item()


def order(data, computed, sharing=None):
    """By the errors of a run and of one of four times the steps."""
    coarse, fine = (error(data, steps, computed, sharing=sharing) for steps in (120, 480))
    return math.log2(coarse / fine) / 2


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("data", DATA)
def test_the_error_falls_by_order_three(data, plan):
    assert order(data, PLANS[plan]) > 2.4


@pytest.mark.parametrize("data", DATA)
def test_without_the_line_it_falls_by_order_two(data):
    assert 1.6 < order(data, PLANS["two of three"], sharing=0.0) < 2.4


@pytest.mark.parametrize("data", DATA)
def test_two_thirds_of_the_evaluations_are_closer_than_all_by_euler(data):
    every = error(data, 60, PLANS["every step"], integrates=False)
    assert error(data, 60, PLANS["two of three"]) < every / 5


def test_a_wrong_guess_of_the_next_time_is_made_good():
    x, known, times = torch.ones(1, 1), Solution(), [1.0, 0.9, 0.75, 0.6, 0.4, 0.2, 0.0]
    for step, (here, there) in enumerate(itertools.pairwise(times)):
        known.arrive(here, torch.full((1, 1), here))  # dx = c dc ends at x - 1/2
        handed = known.answer(here, there if step == 5 else there + 0.05)
        known.hand(here, handed)
        x = x + (there - here) * handed
    torch.testing.assert_close(x, torch.full((1, 1), 0.5), atol=1e-6, rtol=0)


def test_noise_is_not_followed():
    known, draw = Solution(), torch.Generator().manual_seed(0)
    for step in range(8):
        known.arrive(1 - step / 10, torch.randn(2, 1000, generator=draw))
    assert (known.share == 0).all()


def test_rows_are_apart():
    mixed, alone = Solution(), Solution()
    for clock in (1.0, 0.8, 0.7, 0.4):
        rows = torch.tensor([[clock**2, 1.0], [math.sin(9 * clock), 2.0]])
        mixed.arrive(clock, rows)
        alone.arrive(clock, rows[1:])
        handed = [each.answer(clock, clock - 0.1) for each in (mixed, alone)]
        torch.testing.assert_close(handed[0][1:], handed[1])
        mixed.hand(clock, handed[0])
        alone.hand(clock, handed[1])


def test_rows_that_guide_each_other_are_trusted_alike():
    known = Solution(guidance=lambda halves: (3 * halves[1:] - 2 * halves[:1]).expand_as(halves))
    for clock in (1.0, 0.8, 0.7, 0.4):
        known.arrive(clock, torch.tensor([[clock**2, 1.0], [math.sin(9 * clock), 2.0]]))
    assert (known.share == known.share[:1]).all()
