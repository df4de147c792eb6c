"""The measures against values that can be known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from specdiff.errors import SpecdiffError
from specdiff.evaluation.features import (
    Features,
    Probe,
    feature_distance,
    features,
    kernel_distance,
)
from specdiff.evaluation.measures import (
    PeakMemory,
    closeness,
    flop_counter,
    flops_share,
    latent_error,
    time_ratio,
)
from specdiff.measure.comparison import worst_tenth
from specdiff.runtime.records.stats import Stats


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_latent_error_is_relative() -> None:
    reference = torch.full((1, 4, 3), 2.0)
    assert latent_error(reference, reference) == 0
    assert latent_error(1.5 * reference, reference) == pytest.approx(0.5)


def test_time_ratio_is_the_median_of_the_rounds_ratios() -> None:
    # a round in which the whole machine was slow counts like any other
    assert time_ratio([4.0, 40.0, 4.0], [2.0, 20.0, 1.0]) == 2.0


def test_the_worst_tenth_is_one_picture_at_least() -> None:
    assert worst_tenth([30.0, 20.0, 40.0]) == 20
    assert worst_tenth([*range(40, 20, -1)]) == 21.5


def test_distance_of_feature_maps_is_relative_and_averaged_over_taps() -> None:
    ones, pooled = torch.ones(1, 2, 2, 2), torch.ones(1, 2)
    near = Features((1.5 * ones, 1.25 * ones), pooled)
    assert feature_distance(near, Features((ones, ones), pooled)).item() == pytest.approx(0.375)


def test_features_tell_likeness_from_noise() -> None:
    picture = noise(1, 3, 32, 32)
    slight = (picture + 0.02 * noise(1, 3, 32, 32, seed=1)).clamp(0, 1)
    other = noise(1, 3, 8, 8, seed=2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    seen, near, far = (features(one) for one in (picture, slight, other))
    assert feature_distance(seen, seen).item() == 0
    assert 0 < feature_distance(near, seen).item() < 0.5 * feature_distance(far, seen).item()
    assert seen.pooled.shape == (1, 1280)


def test_likeness_of_a_picture_with_itself_is_perfect() -> None:
    picture = noise(24, 24, 3)
    found = closeness(picture, picture, picture, picture, torch.device("cpu"))
    assert math.isinf(found.psnr)
    assert (found.ssim, found.feature_distance, found.latent_error) == (1.0, 0.0, 0.0)


def test_kernel_distance_is_near_zero_for_one_distribution_and_not_for_two() -> None:
    draws = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    same = kernel_distance(draws[:200], draws[200:])
    shifted = kernel_distance(draws[:200], draws[200:] + 1)
    assert abs(same) < 0.1
    assert shifted > 10 * abs(same)


def test_kernel_distance_of_two_pairs_by_hand() -> None:
    ours, theirs = torch.zeros(2, 1), torch.ones(2, 1)
    # k(0, 0) = 1, k(1, 1) = 8, k(0, 1) = 1
    assert kernel_distance(ours, theirs) == pytest.approx(1 + 8 - 2)


def test_kernel_distance_needs_two_of_each() -> None:
    with pytest.raises(ValueError, match="at least two"):
        kernel_distance(torch.zeros(1, 4), torch.zeros(3, 4))


def test_probe_recognises_the_highest_score_of_known_prompts(tmp_path: Path) -> None:
    file = tmp_path / "probe.safetensors"
    tensors = {"weight": torch.eye(2), "bias": torch.zeros(2)}
    save_file(tensors, file, metadata={"names": '["cat", "dog"]'})
    probe = Probe.load(file)
    pooled = torch.tensor([[2.0, 1.0], [2.0, 1.0], [0.0, 1.0]])
    assert probe.recognised(pooled, ["cat", "dog", "horse"]) == 0.5
    assert math.isnan(probe.recognised(pooled[:1], ["horse"]))
    with pytest.raises(SpecdiffError, match="no probe"):
        Probe.load(tmp_path / "other")


def test_flops_share_adds_dense_look_ahead_and_selective_steps() -> None:
    def step_flops(active: int | None) -> int:
        return 1000 if active is None else 100 + 9 * active

    usage = Stats(
        dense=3, selective=5, skipped=2, speculative=1, tokens_computed=4 * 100 + 5 * 20,
        tokens_total=10 * 100, cache_bytes=0, fallbacks={}, graphs=1, recompiles=0,
        compile_seconds={}, token_counts=None,
    )  # fmt: skip
    share = flops_share(step_flops, usage, steps=10)
    assert share == pytest.approx((4 * 1000 + 5 * (100 + 9 * 20)) / 10_000)


def test_flop_counter_sees_the_cpu_s_attention() -> None:
    query = torch.randn(1, 2, 16, 8)
    with torch.no_grad(), flop_counter() as counter:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert counter.get_total_flops() == 2 * (2 * 2 * 16 * 16 * 8)


def test_peak_memory_sees_what_was_held_for_a_while() -> None:
    memory = PeakMemory(torch.device("cpu"))
    if memory.before is None:
        pytest.skip("no /proc here")
    memory.restart()
    torch.zeros(2**24).add_(1)  # 64 MiB, touched and given back
    found = memory.bytes
    assert found is not None
    assert found > 60 * 2**20
