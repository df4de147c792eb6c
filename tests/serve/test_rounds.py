"""Who waits for whom before calls are answered together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from specdiff.runtime.streams.registry import ModelState, Session
from specdiff.serve import rounds
from specdiff.serve.joining import call_of
from specdiff.serve.rounds import Rounds, Waiting


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Calls in each round that was answered; a round that is not complete waits long."""
    monkeypatch.setattr(rounds, "PATIENCE", 30.0)
    return []


@pytest.fixture
def running(sizes: list[int]) -> Iterator[Rounds]:
    def evaluate(_: nn.Module, group: Any) -> list[Any]:
        sizes.append(len(group))
        return [None] * len(group)

    running = Rounds(nn.Identity(), evaluate, most=3)
    yield running
    running.close()


def called(running: Rounds, generation: object, *, begins: bool) -> Waiting:
    """A call that was handed over."""
    call = call_of((torch.zeros(1, 2, 3),), {})
    waiting = Waiting(call, Session(ModelState(), None, {}), begins=begins)
    running.expect(generation, True)
    running.put(waiting)
    return waiting


def test_those_that_begin_wait_for_others_that_do(running: Rounds, sizes: list[int]) -> None:
    """As many as may be in progress: three, of four that are announced."""
    for generation in range(4):
        running.announce(generation)
    first = [called(running, generation, begins=True) for generation in range(3)]
    for waiting in first:
        waiting.output.result(timeout=10)
    assert sizes == [3]


def test_those_under_way_wait_for_none_that_begins(running: Rounds, sizes: list[int]) -> None:
    called(running, "first", begins=True).output.result(timeout=10)
    running.announce("second")
    called(running, "first", begins=False).output.result(timeout=10)
    assert sizes == [1, 1]


def test_one_that_was_announced_and_stopped_is_waited_for_no_longer(
    running: Rounds, sizes: list[int]
) -> None:
    running.announce("other")
    waiting = called(running, "first", begins=True)
    running.expect("other", False)
    waiting.output.result(timeout=10)
    assert sizes == [1]
