"""A small random model with one call of it: what the coverage table is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]


def randomize(model: nn.Module) -> nn.Module:
    """No weight stays at zero or one: a gate that is closed would hide a fault behind it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.02 * noise if parameter.dim() > 1 else 0.1 * noise)
    return model.eval()


@dataclass
class Case:
    """A denoiser in eval mode with random weights, and the keyword arguments of one forward."""

    model: nn.Module
    inputs: Inputs
    latent: str = "hidden_states"
    """The argument that is denoised: a tensor, or a list of tensors."""
    time: str = "timestep"
    """The argument that says where in time."""
    also: tuple[str, ...] = ()
    """Further arguments that are denoised, in the order of their predictions."""

    def __post_init__(self) -> None:
        """Weights away from zero and one."""
        randomize(self.model)

    def later(self, by: float = 0.3, inputs: Inputs | None = None) -> Inputs:
        """A call (the first) one step later: another latent, another time."""
        call = self.inputs if inputs is None else inputs
        generator = torch.Generator().manual_seed(2)

        def moved(value: Tensor) -> Tensor:
            return value + by * torch.randn(value.shape, generator=generator).to(value)

        latent, time = call[self.latent], call[self.time]
        return {
            **call,
            self.latent: [moved(v) for v in latent] if isinstance(latent, list) else moved(latent),
            self.time: (time * 0.9).to(time.dtype),
        }


Builder = Callable[[], Case]


def builders(*functions: Builder) -> dict[str, Builder]:
    """A table of builders by the names of their functions."""
    return {function.__name__: function for function in functions}
