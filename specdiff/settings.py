"""Settings: what the runtime reads, and what methods and qualities stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from specdiff.plan import Plan

METHODS = ("history", "paper")

# Used where an option is left None. Those of "history" were measured on two models (README,
# results; examples/eval says what decided each). "paper" has the paper's values, and where it is
# silent those of paper.md; but importance, which it measures in every step, is 0.4 to 1.1 dB better
# left to dense ones.
METHOD_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "history": {
        "cache_ratio": 1.0,
        "warmup_steps": 1,
        "refresh_interval": 4,
        "tapered": True,
        "stride": 1,
        "text_refresh": 1,
        "selective_importance": True,
        "speculative_steps": 2,
        "reuse_share": 0.0,
        "starvation": 0.0,
        "forecast": "linear",
        "correction": True,
    },
    "paper": {
        "cache_ratio": 0.9,
        "warmup_steps": 3,
        "refresh_interval": 0,
        "tapered": False,
        "stride": 1,
        "text_refresh": 1,
        "selective_importance": False,
        "speculative_steps": 2,
        "reuse_share": 0.1,
        "starvation": 3.0,
        "forecast": "mean",
        "correction": False,
    },
}

# `quality`: plans of 28 evaluations, found by `specdiff tune` and measured on two models (README).
QUALITIES: Mapping[str, Plan] = {
    # Single skips where errors grow little: not early, and not in the last, longest steps.
    "closest": Plan.of(28, (*range(11), *range(12, 24, 2), *range(24, 28))),
    "near-lossless": Plan.of(28, (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 27)),
    "balanced": Plan.of(28, (0, 2, 4, 7, 10, 14, 18, 22, 26, 27)),
    "fast": Plan.of(28, (0, 3, 7, 11, 16, 21, 25, 27)),
}
USUAL = "balanced"
"""What "history" does if nothing is said."""
SCHEDULE = ("cache_ratio", "warmup_steps", "refresh_interval", "tapered", "stride")
"""Options that a plan takes the place of, and that take the place of a quality's."""
PLAN_SETTINGS = (
    "method", "text_refresh", "selective_importance", "speculative_steps", "reuse_share",
    "starvation", "forecast", "correction",
)  # fmt: skip
"""Options that a plan may hold."""


@dataclass(frozen=True)
class Settings:
    """The options that the runtime reads at every evaluation, with no default left open."""

    cache_ratio: float
    warmup_steps: int
    speculative_steps: int
    refresh_interval: int
    tapered: bool
    stride: int
    text_refresh: int
    selective_importance: bool
    reuse_share: float
    starvation: float
    forecast: str
    correction: bool
    method: str
    guidance_scale: float | None
    prediction: str
    alphas_cumprod: tuple[float, ...] | None
    max_cache_bytes: int | None
    plan: Plan | None
