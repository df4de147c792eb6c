"""Steps: what a sampler makes of the answers it gets, found without the model.

Predictions here are the directions d_j = (x_j - D_j) / sigma_j of the answers D_j
(`specdiff.runtime.sampler.weights`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdiff.runtime.sampler.weights import Weights, axis

NEAR = 1e-4
"""Share of a sigma within which another is the same."""
MOST = 4
"""Evaluations a step, at most."""


@dataclass(frozen=True)
class Steps:
    """A sampler over one schedule."""

    sigmas: tuple[float, ...]
    """Of its E evaluations."""
    weights: Weights
    """Of the directions in the latents."""
    reads_unguided: bool = False
    """Whether it asks for the answer without guidance, too."""

    @property
    def magnifies(self) -> bool:
        """Whether its pictures depend on the answers so much that every forecast shows.

        It sets guided answers against earlier ones without guidance (`dpmpp_2m_cfg_pp`).
        """
        return self.reads_unguided and not self.weights.is_first_order

    def is_at(self, index: int, sigma: float) -> bool:
        """Whether evaluation `index` is at this noise level."""
        known = self.sigmas[index] if index < len(self.sigmas) else 0.0
        return abs(known - sigma) <= NEAR * abs(sigma)


class _TooLong(Exception):
    pass


class _Axes:
    """Stands in for the model: each answer's direction is an axis of its own."""

    def __init__(self, guider: Any, size: int) -> None:
        self.inner_model = guider
        self.latents: list[Tensor] = []
        self.sigmas: list[float] = []
        self.reads_unguided = False
        self._size = size

    def __call__(self, x: Tensor, sigma: Tensor, **options: Any) -> Tensor:
        if len(self.latents) == self._size:
            raise _TooLong
        direction = axis(x, len(self.latents))
        self.latents.append(x.clone())
        self.sigmas.append(float(sigma.flatten()[0]))
        answer = x - self.sigmas[-1] * direction
        for function in options.get("model_options", {}).get("sampler_post_cfg_function", ()):
            self.reads_unguided = True
            answer = function({"denoised": answer, "uncond_denoised": answer, "input": x})
        return answer


def steps_of(sampler: Any, guider: Any, sigmas: Tensor) -> Steps | None:
    """The steps of ComfyUI's `KSAMPLER`; None of one that adds noise, adapts, or is another kind.

    Args:
        sampler: has `sampler_function` and `extra_options`.
        guider: what it will ask, for those that look into it.
        sigmas: the schedule.
    """
    function: Callable[..., Tensor] | None = getattr(sampler, "sampler_function", None)
    options: Mapping[str, Any] = getattr(sampler, "extra_options", {})
    if function is None:
        return None
    size = MOST * len(sigmas)
    axes = _Axes(guider, size)
    start = torch.zeros(1, 1, 1, size + 1)  # the last: what nobody put there
    more = {"extra_args": {"model_options": {}, "seed": 0}, "callback": None, "disable": True}
    try:
        with torch.random.fork_rng(devices=[]):
            end = function(axes, start, sigmas.cpu(), **more, **options)
    except Exception:
        return None  # it wants what only a real run has
    weights = Weights.of([*axes.latents, end])
    if weights is None:
        return None
    return Steps(tuple(axes.sigmas), weights, axes.reads_unguided)
