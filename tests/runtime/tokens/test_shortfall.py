"""What forecasts cost a latent is made good exactly where predictions are a parabola in time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from specdiff.runtime.sampler.weights import Weights
from specdiff.runtime.tokens.history import ComputedOutput
from specdiff.runtime.tokens.shortfall import Shortfall

STEPS = 14


def adams(order: int) -> Weights:
    """Of an Adams-Bashforth solver that begins with lower orders, by steps of 1."""
    formulas = {1: (1.0,), 2: (1.5, -0.5), 3: (23 / 12, -16 / 12, 5 / 12)}
    rows = torch.zeros(STEPS + 1, STEPS, dtype=torch.float64)
    for index in range(STEPS):
        rows[index + 1] = rows[index]
        for age, weight in enumerate(formulas[min(order, index + 1)]):
            rows[index + 1, index - age] += weight
    return Weights(rows)


def handed(
    truth: Tensor, weights: Weights, dense: Sequence[int], wrong: float = 0.3
) -> tuple[list[Tensor], Shortfall]:
    """What a run hands out that forecasts the newest computed prediction, off by a constant."""
    shortfall, computed, given = Shortfall(), [], []
    for index, prediction in enumerate(truth):
        if index in dense:
            times = torch.full(prediction.shape[:2], float(index))
            computed = [ComputedOutput(times, prediction), *computed][:3]
            given.append(shortfall.computed(0, index, computed, weights))
        else:
            known = computed[0].tokens + wrong
            given.append(shortfall.forecast(0, index, float(index), known, weights))
    return given, shortfall


def parabola() -> Tensor:
    """[STEPS, B, N, C]"""
    generator = torch.Generator().manual_seed(0)
    start, slope, bend = torch.randn(3, 2, 5, 3, generator=generator)
    time = torch.arange(float(STEPS)).reshape(-1, 1, 1, 1)
    return 5 + start + 0.1 * slope * time + 0.01 * bend * time**2


@pytest.mark.parametrize("order", [1, 2, 3])
def test_latents_after_computed_predictions_are_exact(order: int) -> None:
    truth, weights, dense = parabola(), adams(order), (0, 1, 2, 5, 8, 9, 13)
    given, _ = handed(truth, weights, dense)
    for index in dense[3:]:
        row = weights.rows[index + 1].float()
        reached, right = (
            (torch.einsum("j,jbnc->bnc", row, torch.stack([*each])) for each in (given, truth))
            if index == STEPS - 1
            else (
                torch.einsum("j,jbnc->bnc", row[: index + 1], torch.stack([*each[: index + 1]]))
                for each in (given, truth)
            )
        )
        torch.testing.assert_close(reached, right, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("order", "most"), [(1, 1), (2, 3), (3, 8)])
def test_few_predictions_are_kept(order: int, most: int) -> None:
    _, shortfall = handed(parabola(), adams(order), (0, 1, 2, 5, 8, 9, 13))
    assert len(shortfall._short) <= most


def test_no_weights_no_change() -> None:
    prediction = torch.ones(1, 2, 3)
    shortfall = Shortfall()
    assert shortfall.forecast(0, 0, 0.0, prediction, None) is prediction
    computed = [ComputedOutput(torch.full((1, 2), float(i)), i * prediction) for i in (2, 0)]
    assert shortfall.computed(0, 2, computed, None) is computed[0].tokens


def test_no_more_is_put_on_top_than_there_is_and_the_rest_later() -> None:
    prediction, shortfall, weights = torch.ones(1, 2, 3), Shortfall(), adams(1)
    shortfall.forecast(0, 1, 1.0, 9 * prediction, weights)
    computed = [ComputedOutput(torch.full((1, 2), float(i)), prediction) for i in (2, 0)]
    for index in (2, 3, 4):
        assert shortfall.computed(0, index, computed, weights).abs().max() < 1e-6
        computed.insert(0, ComputedOutput(torch.full((1, 2), index + 1.0), prediction))


def test_what_was_put_on_top_counts_after_a_break() -> None:
    """Where the model changes, earlier predictions are as wrong as they were."""
    prediction, weights = torch.ones(1, 2, 3), adams(2)
    whole, broken = Shortfall(), Shortfall()
    for shortfall in (whole, broken):
        shortfall.forecast(0, 1, 1.0, 1.2 * prediction, weights)
        computed = [ComputedOutput(torch.full((1, 2), float(i)), prediction) for i in (2, 0)]
        assert not torch.equal(shortfall.computed(0, 2, computed, weights), prediction)
    broken.break_off()
    computed.insert(0, ComputedOutput(torch.full((1, 2), 3.0), prediction))
    found = [shortfall.computed(0, 3, computed, weights) for shortfall in (whole, broken)]
    assert torch.equal(*found) and not torch.equal(found[0], prediction)
