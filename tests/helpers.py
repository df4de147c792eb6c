"""What tests in several folders need: usual plans, and the counters of a compiled model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn
from torch.profiler import ProfilerActivity, profile

import specdiff
from specdiff.plan import Plan

PLAN = {"plan": Plan.every(4, warmup=3), "cache_ratio": 0.75}
"""Three dense steps, then every fourth; the others compute a quarter of the tokens."""
THREE_DENSE = {"plan": Plan.warmup(3), "cache_ratio": 0.75}
"""Three dense steps; all others compute a quarter of the tokens."""


def step_counts(model: nn.Module) -> tuple[int, int, int]:
    """How many steps were dense, selective and skipped."""
    stats = specdiff.stats(model)
    return stats.dense, stats.selective, stats.skipped


def counts(model: nn.Module) -> tuple[int, int, int, int]:
    """As `step_counts`, and how many evaluations looked ahead."""
    return (*step_counts(model), specdiff.stats(model).speculative)


Result = TypeVar("Result")


def with_ops(call: Callable[[], Result]) -> tuple[Result, list[str]]:
    """What a call returns, and the ATen ops that it ran from Python, by the profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        result = call()
    events = [event for event in found.events() if event.cpu_parent is None]
    return result, [event.name for event in events if event.name.startswith("aten::")]
