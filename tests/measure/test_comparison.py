"""Measuring methods against each other, on stand-ins."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from specdiff.measure.comparison import Comparison, Method, compare, count_images, psnr, ssim
from specdiff.models.subject import Request
from tests.measure.standins import REQUESTS, SIDE, noise_picture, stand_ins


@pytest.fixture(name="comparison")
def _comparison() -> Comparison:
    return compare(stand_ins(), REQUESTS, repeats=2)


def test_psnr_of_a_known_error() -> None:
    reference = torch.full((SIDE, SIDE, 3), 0.5)
    assert psnr(reference + 0.1, reference) == pytest.approx(20, abs=1e-4)
    assert psnr(reference, reference) == math.inf


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise() -> None:
    reference = noise_picture(REQUESTS[0])
    noisy = reference + 0.2 * torch.randn(reference.shape)
    assert ssim(reference, reference) == pytest.approx(1)
    assert ssim(noisy, reference) < 0.95


def test_pictures_of_different_shapes_are_refused() -> None:
    cropped = Method("cropped", 4, lambda request: noise_picture(request)[1:])
    with pytest.raises(ValueError, match="cannot compare"):
        compare([*stand_ins(), cropped], REQUESTS, repeats=1)


def test_methods_take_turns_after_the_warm_up() -> None:
    made: list[str] = []

    def recorder(name: str) -> Callable[[Request], Tensor]:
        def generate(request: Request) -> Tensor:
            made.append(f"{name}{request.seed}")
            return noise_picture(request)

        return generate

    methods = [Method(name, 4, recorder(name)) for name in "ab"]
    told: list[str] = []
    compare(methods, REQUESTS, 2, told.append)
    assert made == ["a0", "b0", *["a0", "b0", "a1", "b1"] * 2]
    assert len(told) == len(made) == count_images(methods, REQUESTS, 2)


def test_token_shares_are_relative_to_the_reference(comparison: Comparison) -> None:
    assert [comparison.tokens_share(one) for one in comparison.trials] == [1, 0.5, 0.5, 0.5]


def test_qualities_are_ordered_as_the_errors_are(comparison: Comparison) -> None:
    dense, default, paper, shorter = comparison.trials
    assert dense.psnr == shorter.psnr == math.inf
    assert math.inf > default.psnr > 35 > paper.psnr
