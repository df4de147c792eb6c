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
    """Numbers of a mixture of Gaussians, `signal` of data and `noise` of noise."""

    def __init__(self, means, deviations, weights):
        numbers = (torch.tensor(each) for each in (means, deviations, weights))
        self.means, self.deviations, self.weights = numbers

    def apart(self, x, signal, noise):
        """In deviations of each Gaussian, and these deviations."""
        spread = (signal**2 * self.deviations**2 + noise**2).sqrt()
        return (x[..., None] - signal * self.means) / spread, spread

    def noise(self, x, signal, noise):
        """Its mean, given x."""
        apart, spread = self.apart(x, signal, noise)
        whose = torch.softmax((self.weights / spread).log() - apart**2 / 2, -1)
        return (whose * apart * (noise / spread)).sum(-1)

    def velocity(self, x, sigma):
        """Of a flow: sigma of noise, 1 - sigma of data."""
        apart, spread = self.apart(x, 1 - sigma, sigma)
        whose = torch.softmax((self.weights / spread).log() - apart**2 / 2, -1)
        widens = (sigma - (1 - sigma) * self.deviations**2) / spread
        return (whose * (widens * apart - self.means)).sum(-1)

    def below(self, x, signal, noise):
        apart, _ = self.apart(x, signal, noise)
        return (self.weights * torch.special.ndtr(apart)).sum(-1)

    def solution(self, x, start=(0.0, 1.0), end=(1.0, 0.0)):
        """Where x goes between two levels: in one dimension the share of numbers below stays."""
        share, low, high = self.below(x, *start), torch.full_like(x, -9), torch.full_like(x, 9)
        for _ in range(60):
            middle = (low + high) / 2
            left = self.below(middle, *end) < share
            low, high = torch.where(left, middle, low), torch.where(left, high, middle)
        return (low + high) / 2


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def start():
    return torch.randn(2, 200, generator=torch.Generator().manual_seed(0))


def shifted(steps):
    """Sigmas, closer where noise prevails."""
    evenly = torch.linspace(1, 0, steps + 1)
    return (3 * evenly / (1 + 2 * evenly)).tolist()


def led(x, times, computed, predict, step, clock=lambda time: time, known=None, sharing=None):
    """Where a sampler gets that is led to the solution; x' = step(x, prediction, time, next)."""
    known = known or Solution()
    for index, (here, there) in enumerate(itertools.pairwise(times)):
        known.arrive(clock(here), predict(x, here) if computed(index) else None)
        known.share = known.share if sharing is None else sharing
        handed = known.answer(clock(here), clock(there))
        known.hand(clock(here), handed)
        x = step(x, handed, here, there)
    return x


def euler(x, velocity, here, there):
    return x + (there - here) * velocity


def far(found, exact):
    return (found - exact).abs().mean().item()


def error(data, steps, computed, sharing=None):
    """Mean distance from the solution after Euler's steps from sigma 1 to 0."""
    mixture = Mixture(*DATA[data])
    found = led(start(), shifted(steps), computed, mixture.velocity, euler, sharing=sharing)
    return far(found, mixture.solution(start()))


def falls_by(wrong, steps=120):
    """The order, by the errors of a run of so many steps and of one of four times as many."""
    return math.log2(wrong(steps) / wrong(4 * steps)) / 2


def order(data, computed, sharing=None):
    return falls_by(lambda steps: error(data, steps, computed, sharing))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("data", DATA)
def test_the_error_falls_by_order_three(data, plan):
    assert order(data, PLANS[plan]) > 2.4


@pytest.mark.parametrize("data", DATA)
def test_without_the_line_it_falls_by_order_two(data):
    assert 1.6 < order(data, PLANS["two of three"], sharing=0.0) < 2.4


@pytest.mark.parametrize("data", DATA)
def test_two_thirds_of_the_evaluations_are_closer_than_all_by_euler(data):
    mixture, x = Mixture(*DATA[data]), start()
    for here, there in itertools.pairwise(shifted(60)):
        x = euler(x, mixture.velocity(x, here), here, there)
    assert error(data, 60, PLANS["two of three"]) < far(x, mixture.solution(start())) / 5


@pytest.mark.parametrize("plan", PLANS)
def test_guided_pairs_fall_by_order_three(plan):
    """Gaussians of one deviation guide to another: at the mean to which the guidance points."""
    halves = [Mixture((mean,), (0.3,), (1.0,)) for mean in (0.2, 0.5)]
    guided = Mixture((0.2 + 3 * (0.5 - 0.2),), (0.3,), (1.0,))

    def predict(x, sigma):
        return torch.cat([half.velocity(x[:1], sigma) for half in halves])

    def pointing(both):
        return torch.lerp(both[:1], both[1:], 3.0).expand_as(both)

    def step(x, handed, here, there):
        return euler(x, pointing(handed), here, there)

    def wrong(steps):
        x, known = start()[:1].repeat(2, 1), Solution(guidance=pointing)
        found = led(x, shifted(steps), PLANS[plan], predict, step, known=known)
        return far(found[:1], guided.solution(start()[:1]))

    assert falls_by(wrong) > 2.4


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("data", DATA)
def test_ddim_falls_by_order_three_in_noise_over_signal(data, plan):
    mixture, first, last = Mixture(*DATA[data]), 0.95, 0.0

    def levels(time):
        return math.cos(time * math.pi / 2), math.sin(time * math.pi / 2)

    def clock(time):
        signal, noise = levels(time)
        return noise / signal

    def predict(x, time):
        return mixture.noise(x, *levels(time))

    def ddim(x, handed, here, there):
        (signal, noise), (after, left) = levels(here), levels(there)
        return after * (x - noise * handed) / signal + left * handed

    def wrong(steps):
        times = torch.linspace(first, last, steps + 1).tolist()
        found = led(start(), times, PLANS[plan], predict, ddim, clock)
        return far(found, mixture.solution(start(), levels(first), levels(last)))

    assert falls_by(wrong, 60) > 2.4


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
