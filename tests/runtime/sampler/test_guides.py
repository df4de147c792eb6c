"""Which predictions moved each row, and what a forecast missed of that."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdiff.runtime.sampler.guides import Rows, shares_missed

SCALE = 7.0


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows_moved(kept: float, pairs: list[tuple[int, int]], rounded: torch.dtype) -> Rows:
    """Rows of pictures: those of a pair, with the condition and without, have one latent."""
    count = 2 * len(pairs)
    common, apart = noise(len(pairs), 4096, seed=1), noise(len(pairs), 4096, seed=2)
    before, predictions, now = (torch.empty(count, 4096) for _ in range(3))
    for picture, (with_it, without) in enumerate(pairs):
        before[[with_it, without]] = noise(4096, seed=3 + picture)
        predictions[without] = common[picture]
        predictions[with_it] = common[picture] + 0.1 * apart[picture]
        mixed = common[picture] + SCALE * 0.1 * apart[picture]
        now[[with_it, without]] = kept * before[with_it] - 0.05 * mixed
    missed = noise(count, 16, 8, seed=9)
    return Rows(
        now.to(rounded), before.to(rounded), predictions, missed, noise(count, 16, 8, seed=8)
    )


@pytest.mark.parametrize("kept", [1.0, 0.9])
@pytest.mark.parametrize("pairs", [[(0, 1)], [(1, 0)], [(0, 2), (1, 3)], [(1, 0), (3, 2)]])
def test_the_last_step_tells_the_mix(pairs, kept):
    rows = rows_moved(kept, pairs, torch.float32)
    shares = shares_missed(rows).flatten()
    for with_it, without in pairs:
        mixed = [t[without] + SCALE * (t[with_it] - t[without]) for t in rows[3:]]
        expected = (mixed[0].norm() / mixed[1].norm()).item()
        assert shares[[with_it, without]].tolist() == pytest.approx([expected] * 2, rel=1e-3)


def test_rounded_latents_tell_it_too():
    exact, rounded = (
        shares_missed(rows_moved(1.0, [(0, 1)], kind)) for kind in (torch.float32, torch.bfloat16)
    )
    torch.testing.assert_close(rounded, exact, rtol=0.2, atol=0)


def test_pictures_of_their_own_count_alone():
    before, predictions = noise(3, 4096, seed=1), noise(3, 4096, seed=2)
    missed, computed = noise(3, 16, 8, seed=3), noise(3, 16, 8, seed=4)
    rows = Rows(before - 0.05 * predictions, before, predictions, missed, computed)
    alone = missed.flatten(1).norm(dim=1) / computed.flatten(1).norm(dim=1)
    torch.testing.assert_close(shares_missed(rows).flatten(), alone, rtol=1e-4, atol=0)


def test_where_nothing_moved_each_counts_alone():
    rows = rows_moved(1.0, [(0, 1)], torch.float32)._replace(latents=noise(2, 4096, seed=1))
    rows = rows._replace(before=rows.latents)
    alone = rows.missed.flatten(1).norm(dim=1) / rows.computed.flatten(1).norm(dim=1)
    torch.testing.assert_close(shares_missed(rows).flatten(), alone)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_predictions_of_half_precision_are_mixed_in_float32(kind):
    exact = rows_moved(1.0, [(0, 1)], torch.float32)
    rounded = exact._replace(missed=exact.missed.to(kind), computed=exact.computed.to(kind))
    shares = shares_missed(rounded)
    assert shares.dtype is torch.float32
    torch.testing.assert_close(shares, shares_missed(exact), rtol=1e-2, atol=0)
