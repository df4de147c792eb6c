"""Scheduler: what a scheduler at hand, as diffusers has them, makes of the generation it is set to.

It is read, never changed: a copy of it gets axes in place of predictions (`weights`). The times are
those it has when a generation begins, in whatever form the pipeline hands them to the model.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from specdiff.errors import OptionError
from specdiff.runtime.sampler.fresh import Fresh, flow_levels, fresh_noise
from specdiff.runtime.sampler.weights import Weights, axis

ROUNDED = 2.0**-8
"""Share of the unit of time by which a model's time may differ: it may be bf16."""
LINEAR = 1e-3
"""What a scheduler's latents may miss of the sum of its weights, relative to their size."""
UNSET = (
    "it has no timesteps yet: call its set_timesteps before the model, or give the one that the"
    " pipeline steps with"
)
ELSEWHERE = "the model is called at other times: give the one that the pipeline steps with"
TURNS = "its times do not fall or rise throughout"
UNDER_WAY = "the generation had begun without it"
NOISY = "its steps draw noise"
BENT = "its steps are no sums of predictions (clip_sample and thresholding make them so)"

FORMS: tuple[Callable[[float, float], float], ...] = (
    lambda time, unit: time,
    lambda time, unit: time / unit,
    lambda time, unit: 1 - time / unit,
    lambda time, unit: unit - time,
)
"""In which pipelines hand times to models: the unit is where a flow's sigma is 1."""


@dataclass(frozen=True, eq=False)
class Run:
    """A generation, from one of its evaluations on."""

    times: tuple[float, ...]
    """Of the evaluations, as the model gets them, but for rounding."""
    first: int
    """How many evaluations the generation had before."""
    weights: Weights | None
    """Of the whole generation; None: not known."""
    why_not: str = ""
    """Why there are no weights."""
    fresh: Fresh | None = None
    """The noise that it draws along a flow, of the whole generation."""

    def is_at(self, index: int, time: float) -> bool:
        """Whether evaluation `index`, counted from the first one here, is at this time."""
        return index < len(self.times) and _near(self.times[index], time)


class Scheduler:
    """A user's scheduler.

    Raises:
        OptionError: it has no `step`, or is a class.
    """

    def __init__(self, scheduler: Any) -> None:
        if isinstance(scheduler, type):
            raise OptionError(
                f"scheduler: {scheduler.__name__} is a class; give what the pipeline steps with,"
                " such as pipe.scheduler"
            )
        if not callable(getattr(scheduler, "step", None)):
            raise OptionError(
                f"scheduler: a {type(scheduler).__name__} has no method step; give a scheduler as"
                " diffusers has them, such as pipe.scheduler"
            )
        self._scheduler = scheduler
        self._timesteps: object = None
        """Those of the generation that `_begun` is of."""
        self._begun: Run | None = None

    def run(self, time: float) -> Run | str:
        """What begins with a model call at this time; or why it is not this scheduler's.

        Weights are found once for each call of `set_timesteps`.
        """
        timesteps = getattr(self._scheduler, "timesteps", None)
        if not isinstance(timesteps, Tensor) or not timesteps.numel() or self._is_new:
            return UNSET
        values = [float(value) for value in timesteps.tolist()]
        steps = [after - before for before, after in itertools.pairwise(values)]
        if min(steps, default=0) < 0 < max(steps, default=0):
            return TURNS
        begins = getattr(self._scheduler, "step_index", None) is None
        found = self._found(values, time)
        if found is None:
            return ELSEWHERE
        index, times = found
        known = self._begun if timesteps is self._timesteps else None
        if known is not None and times[known.first :] == known.times:
            return replace(known, times=times[index:], first=index - known.first)
        if not begins:
            return Run(times[index:], index, None, UNDER_WAY)
        weights = _weights(self._scheduler, timesteps[index:])
        if isinstance(weights, Weights):
            run = Run(times[index:], index, weights)
        else:
            fresh = self._fresh(timesteps[index:], times[index:]) if weights == NOISY else None
            run = Run(times[index:], index, None, weights, fresh)
        self._timesteps, self._begun = timesteps, run
        return replace(run, first=0)

    def _fresh(self, timesteps: Tensor, times: Sequence[float]) -> Fresh | None:
        """The noise that it draws, where models of flows get their times as they are."""
        unit = self._unit if float(timesteps[0]) > 1 else 1.0
        levels = flow_levels(self._scheduler, timesteps.tolist(), unit)
        if levels is None or not (_near(levels[0], times[0]) or times[0] == timesteps[0]):
            return None
        return fresh_noise(_copied(self._scheduler), timesteps.cpu(), levels)

    @property
    def _is_new(self) -> bool:
        """Whether its timesteps are those of training, which it has until they are set."""
        config = getattr(self._scheduler, "config", None)
        trained = getattr(config, "num_train_timesteps", None)
        counted = getattr(self._scheduler, "num_inference_steps", None)
        return counted is None and len(self._scheduler.timesteps) == trained

    @property
    def _unit(self) -> float:
        config = getattr(self._scheduler, "config", None)
        return float(getattr(config, "num_train_timesteps", 1000))

    def _found(self, values: Sequence[float], time: float) -> tuple[int, tuple[float, ...]] | None:
        """Which evaluation is at a time of the model, and all times as the model gets them."""
        here = getattr(self._scheduler, "step_index", None)
        if here is None:
            here = getattr(self._scheduler, "begin_index", None)
        likeliest = [(0,), range(len(values))] if here is None else [(here,)]
        for places, form in itertools.product(likeliest, FORMS):
            times = tuple(form(value, self._unit) for value in values)
            near = [i for i in places if i < len(times) and _near(times[i], time)]
            if near:
                return min(near, key=lambda i: abs(times[i] - time)), times
        return None


def _near(time: float, other: float) -> bool:
    return abs(time - other) <= ROUNDED * (1000 if max(abs(time), abs(other)) > 1.5 else 1)


def _copied(scheduler: Any) -> Any:
    """A copy of it, all of whose tensors are on the host."""
    own = copy.deepcopy(scheduler)
    for name, value in vars(own).items():
        if isinstance(value, Tensor):
            setattr(own, name, value.cpu())
    return own


def _weights(scheduler: Any, timesteps: Tensor) -> Weights | str:
    """Of a scheduler about to take these steps, or why there are none."""
    own = _copied(scheduler)
    count = len(timesteps)
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = 3 * torch.randn(count + 1, count + 2, generator=generator, device="cpu")
    like = torch.zeros(1, 1, 1, count + 2, device="cpu")
    # the last axis is that of the first latent; none leads to the one before it, but noise does
    latent = torch.cat([axis(like, count + 1), drawn[count].reshape(like.shape)])
    latents = [latent]
    try:
        with torch.random.fork_rng(devices=[]):
            for index, time in enumerate(timesteps.cpu()):
                if hasattr(own, "scale_model_input"):
                    own.scale_model_input(latent, time)
                prediction = torch.cat([axis(like, index), drawn[index].reshape(like.shape)])
                latent = own.step(prediction, time, latent, return_dict=False)[0]
                latents.append(latent)
        probed = torch.stack(latents).double().reshape(count + 1, 2, count + 2)
    except Exception as error:
        return f"{type(scheduler).__name__} does not step by itself: {error}"
    weights = Weights.of([*probed[:, 0, : count + 1]])
    if weights is None:
        return NOISY
    kept = probed[:, 0, count + 1 :]
    expected = kept * drawn[count].double() + weights.rows @ drawn[:count].double()
    missed = (probed[:, 1] - expected).norm()
    return weights if missed <= LINEAR * expected.norm() else BENT
