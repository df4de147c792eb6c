"""Predicting the outputs of tokens that are not computed; each forecaster is one function."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from specdiff.runtime.tokens.clock import Clock, beyond, distance, ratio, within
from specdiff.runtime.tokens.history import History

Forecaster = Callable[[History, Clock, float], Tensor]
"""(history, time, time unit) -> [B, N, C]; the unit is the time at which sigma is 1."""

REACH = 0.5
"""How far a line is followed, as a share of the span between the two outputs it goes through."""

FORECASTERS: dict[str, Forecaster] = {}


def _register(name: str) -> Callable[[Forecaster], Forecaster]:
    def add(forecaster: Forecaster) -> Forecaster:
        FORECASTERS[name] = forecaster
        return forecaster

    return add


def forecast(name: str, history: History, time: Clock, unit: Literal[1, 1000]) -> Tensor:
    """Predict every token's output at `time`.

    Args:
        name: one of `FORECASTERS`.
        history: at least one evaluation.
        time: in the model's own unit, or one of each row.
        unit: the time at which sigma is 1.

    Returns:
        [B, N, C] in the dtype of the outputs.
    """
    return FORECASTERS[name](history, time, unit)


@_register("reuse")
def _reuse(history: History, time: Clock, unit: float) -> Tensor:
    return history.computed[0].tokens


@_register("linear")
def _linear(history: History, time: Clock, unit: float) -> Tensor:
    newest, *older = history.computed
    if not older:
        return newest.tokens
    return beyond(newest.tokens, older[0].tokens, ahead(time, newest.times, older[0].times))


def ahead(time: Clock, newest: Clock, before: Clock) -> Clock:
    """How far beyond two outputs their line is followed, as a share of the way between them.

    A slope measured over a short span is mostly curvature and noise: it is followed no further than
    a share of that span (sigmas of a shifted schedule start close together and end far apart).
    """
    return ratio(within(time - newest, REACH * distance(newest, before)), newest - before)


@_register("mean")
def _mean(history: History, time: Clock, unit: float) -> Tensor:
    """Equation 6: W_i = exp(-i (T_{t+i} - T_t)) / sum over the last three steps, T in [0, 1]."""
    weights = [
        _decayed(step.time - time, age / unit) for age, step in enumerate(history.steps, start=1)
    ]
    total = sum(weights)
    terms = [
        step.tokens.float() * (weight / total)
        for weight, step in zip(weights, history.steps, strict=True)
    ]
    return torch.stack(terms).sum(0).to(history.steps[0].tokens.dtype)


def _decayed(span: Clock, rate: float) -> float | Tensor:
    """exp(-rate |span|), to multiply [B, N, C] by."""
    if isinstance(span, Tensor):
        return torch.exp(-rate * span.abs()).unsqueeze(-1)
    return math.exp(-rate * abs(span))
