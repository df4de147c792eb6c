"""The training scripts' checkpoint: a run that stops and goes on is one that never stopped."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.examples.test_use import script


def run(work: Path) -> Any:
    shared = script("training/training")

    class Small(shared.Training):  # type: ignore[misc, name-defined]
        def loss(self) -> Tensor:
            out: Tensor = self.model(torch.randn(4, 3))
            return out.square().mean()

    torch.manual_seed(0)
    stages = (shared.Stage(batch=4, rate=1.0, ema_decay=0.9),)
    arguments = argparse.Namespace(minutes=[1.0], work=work)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    return Small(model, ("1",), stages, arguments, "small", {})


def steps(training: Any, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        losses.append(training.step())
        training.at.advance(seconds=5.0, pictures=4)
    return losses


def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    whole = run(tmp_path)
    steps(whole, 3)
    whole.save()
    expected = steps(whole, 3)
    resumed = run(tmp_path)
    resumed.load()
    assert steps(resumed, 3) == expected
    for ours, theirs in zip(resumed.average.parameters(), whole.average.parameters(), strict=True):
        assert torch.equal(ours, theirs)
