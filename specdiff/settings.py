"""Settings: what the runtime reads, and what methods and qualities stand for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from specdiff.plan import Plan

# Plans of 28 evaluations, measured on three models (docs/results.md). Where a floor is promised the
# first three are dense: what is lost there costs some pictures most, and nothing tells which.
QUALITIES: Mapping[str, Plan] = {
    # Single skips where errors grow little: not early, and not in the last, longest steps.
    "closest": Plan.of(28, (*range(11), *range(12, 24, 2), *range(24, 28))),
    # Nothing left out of the first steps, whose errors grow most on some pictures.
    "near-lossless": Plan.of(28, (*range(7), *range(8, 27, 2), 27)),
    "balanced": Plan.of(28, (0, 1, 2, 4, 7, 10, 14, 18, 22, 26, 27)),
    "fast": Plan.of(28, (0, 2, 4, 7, 11, 16, 21, 25, 27)),
}
SOLUTION_PLANS: Mapping[str, Plan] = {
    "closest": Plan.of(28, (0, 1, 2, 4, 6, 8, 10, 12, *range(14, 20), *range(22, 28))),
    "near-lossless": Plan.of(28, (0, 2, 3, 4, 6, 8, 10, 12, 15, 16, 18, 20, 24, 26, 27)),
    "balanced": Plan.of(28, (0, 2, 4, 7, 10, 12, 15, 18, 20, 25, 26, 27)),
    "fast": Plan.of(28, (0, 2, 4, 8, 9, 12, 18, 22, 26, 27)),
}
"""The plans of qualities for `target="solution"`, found by examples/research/placing.py: integrated
steps miss other things than forecasts do."""
TRUSTED: Mapping[str, float] = {
    "closest": 0.1, "near-lossless": 0.1, "balanced": 0.3, "fast": 0.5,
}  # fmt: skip
"""Share of what moves a latent that a forecast may miss, by quality; where one missed more, the
next goes less far (examples/research/trusting.md says what that costs and saves)."""
FEW = 8
"""Evaluations of a generation up to which all are dense, unless a plan is given: forecasts over
such steps are worse than as many steps fewer."""
DEFAULT = "balanced"
"""The quality where none is given."""
OFF = "dense"
"""The quality that switches acceleration off."""
SWITCH = "SPECDIFF"
"""The environment variable that switches it off for the process, set to "off"."""

# What a method stands for. "history" was measured on two models (docs/results.md; examples/eval
# says what decided each value). "paper" is the paper to the letter, and where that is silent what
# was measured best.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "history": {
        "forecast": "linear",
        "reuse_share": 0.0,
        "starvation": 0.0,
        "correction": True,
        "selective_importance": True,
        "few": FEW,
        "trusted": TRUSTED[DEFAULT],
    },
    "paper": {
        "plan": Plan.warmup(3, cache_ratio=0.9),
        "forecast": "mean",
        "reuse_share": 0.1,
        "starvation": 3.0,
        "correction": False,
        "selective_importance": True,
        "few": 0,
        "trusted": 0.0,
    },
}
IMPORTANCE_QUERIES = 32
"""Query rows per attention, at most, that importance is measured from."""
PLAN_OPTIONS = ("method", "cache_ratio", "forecast", "text_steps")
"""Options that a plan may hold."""
ABLATIONS = (
    "reuse_share", "starvation", "correction", "selective_importance", "importance_queries",
    "trusted",
)  # fmt: skip
"""Constants of the methods that experiments change, by the private option `ablation`."""


@dataclass(frozen=True)
class Settings:
    """What the runtime reads at every evaluation, with no default left open."""

    accelerated: bool
    """Whether anything but the model's own graph may run."""
    plan: Plan
    few: int
    """A generation of no more evaluations, where their number is known, is dense; 0: none is."""
    trusted: float
    """Share of what moves a latent that a forecast may miss (`runtime.tokens.trust`); 0: the plan
    is followed as it is."""
    cache_ratio: float
    text_steps: str
    method: str
    forecast: str
    reuse_share: float
    """Share of the total score held by the lowest-scoring tokens, whose previous output is reused
    as it is (the paper's class C2) instead of forecast."""
    starvation: float
    """Scale s of the starvation factor exp(s * times cached) in the score (equation 2)."""
    correction: bool
    """Whether what forecasts have cost the latent is made good when tokens are next computed: the
    output then is the model's own and what the latent is short of (`runtime.correction`)."""
    selective_importance: bool
    """Whether selective evaluations measure importance anew, from the tokens that they compute;
    otherwise the last that was measured serves. Either has programs of its own."""
    target: str
    """What pictures are to be close to: those of "dense" steps, or the "solution" of the equation
    that the sampler follows."""
    guidance_scale: float | None
    prediction: str
    alphas_cumprod: tuple[float, ...] | None
    max_cache_bytes: int | None


def why_off(settings: Settings) -> str:
    """What has switched acceleration off, read anew at each call; empty if nothing has."""
    if not settings.accelerated:
        return f"quality={OFF!r}"
    value = os.environ.get(SWITCH, "")
    return f"{SWITCH}={value}" if value.lower() == "off" else ""
