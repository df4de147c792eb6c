"""Timing: measure one piece of work, or contestants that take turns (A B A B)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch

Contestant = TypeVar("Contestant")
Task = TypeVar("Task")
Result = TypeVar("Result")
CPU = torch.device("cpu")


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timed(
    work: Callable[[], Result],
    device: torch.device = CPU,
    clock: Callable[[], float] | None = None,
) -> tuple[Result, float]:
    """Return what `work` returns, and the seconds until the device has finished it.

    Args:
        work: What to do.
        device: Where it runs; `timed` waits for it before and after.
        clock: Returns seconds; None: `time.perf_counter`.
    """
    now = clock or time.perf_counter
    wait(device)
    start = now()
    result = work()
    wait(device)
    return result, now() - start


def in_turns(
    contestants: Sequence[Contestant],
    tasks: Iterable[Task],
    run: Callable[[Contestant, Task], Result],
    device: torch.device = CPU,
    clock: Callable[[], float] | None = None,
    before: Callable[[Contestant, Task], None] = lambda contestant, task: None,
) -> Iterator[tuple[Contestant, Task, Result, float]]:
    """Let every contestant do a task before the next task begins, so that all see the same machine.

    Args:
        contestants: Who takes turns.
        tasks: What each of them does, in order.
        run: Does a task; what is timed.
        device: Where it runs.
        clock: As of `timed`.
        before: Called before each, not timed.

    Yields:
        Contestant, task, what `run` returned, and its seconds.
    """
    for task in tasks:
        for one in contestants:
            before(one, task)
            result, seconds = timed(partial(run, one, task), device, clock)
            yield one, task, result, seconds
