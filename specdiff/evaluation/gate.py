"""Gate: may a pipeline go live under a plan? `specdiff verify` asks, and a deployment obeys.

Two questions: do the rewritten programs agree with the oracles on the pipeline's first call, and
are the pictures of given prompts as close to the dense ones as they have to be?
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import specdiff
from specdiff.errors import SpecdiffError
from specdiff.inspect.target import ModelCall, returned_call
from specdiff.measure.comparison import psnr
from specdiff.models.named import function_named
from specdiff.models.picture_model import Order, PictureModel, load_picture_model, of_pipeline
from specdiff.oracles.verification import Verification
from specdiff.settings import OFF

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Floors:
    """The least PSNR in dB that passes: of every picture, and of their mean."""

    each: float
    mean: float


@dataclass(frozen=True)
class Likeness:
    """How close the plan's picture is to the dense one."""

    order: Order
    psnr: float


@dataclass(frozen=True)
class Gate:
    """The verdict.

    Attributes:
        name: Of what was asked about.
        verification: What the oracles say.
        floors: What the pictures had to reach.
        pictures: What they reached; none where only a model was given.
        steps: Evaluations of the plan, by kind.
        fallbacks: Evaluations dense by no plan, by reason.
    """

    name: str
    verification: Verification
    floors: Floors
    pictures: Sequence[Likeness] = ()
    steps: Mapping[str, int] | None = None
    fallbacks: Mapping[str, int] | None = None

    @property
    def worst(self) -> float:
        """The least PSNR of a picture, dB; infinite where all are equal, or there is none."""
        return min((each.psnr for each in self.pictures), default=math.inf)

    @property
    def mean(self) -> float:
        """The mean of their PSNR, dB."""
        return statistics.fmean(each.psnr for each in self.pictures) if self.pictures else math.inf

    @property
    def failures(self) -> tuple[str, ...]:
        """Why not; empty if it passes."""
        found = []
        if not self.verification.passed:
            found.append("a rewritten program disagrees with the model")
        if not self.worst >= self.floors.each:  # NaN is no picture
            found.append(f"the worst picture has {self.worst:.1f} dB of {self.floors.each:g}")
        if not self.mean >= self.floors.mean:
            found.append(f"the mean is {self.mean:.1f} dB of {self.floors.mean:g}")
        return tuple(found)

    def record(self) -> dict[str, Any]:
        """All of it as strict JSON; a PSNR that is not finite is None: of equal pictures."""
        return {
            "name": self.name,
            "passed": not self.failures,
            "failures": list(self.failures),
            "oracles": {
                "passed": self.verification.passed,
                "largest_error": self.verification.max_error,
                "selective": self.verification.selective,
                "reasons": list(self.verification.reasons),
            },
            "floor_db": vars(self.floors),
            "psnr_db": {"worst": _finite(self.worst), "mean": _finite(self.mean)},
            "pictures": [
                {**vars(each.order), "psnr_db": _finite(each.psnr)} for each in self.pictures
            ],
            "steps": self.steps,
            "fallbacks": self.fallbacks,
        }


def load_either(target: str, device: torch.device) -> PictureModel | ModelCall:
    """What a command names: a pipeline, or a model and the inputs of one call.

    Args:
        target: As of `load_picture_model`; a function may also return a model and a dict.
        device: Where a pipeline is put; a function chooses its own.

    Raises:
        SpecdiffError: There is nothing of that name, or it is neither.
    """
    if ":" not in target or Path(target).is_dir():
        return load_picture_model(target, device)
    returned = function_named(target)()
    if isinstance(returned, tuple):
        return returned_call(target, returned)
    return of_pipeline(returned, target.rpartition(":")[2])


def judge_call(call: ModelCall, options: Mapping[str, Any]) -> Gate:
    """The oracles alone, on one call of a model."""
    verification = specdiff.verify(call.model, options=options, **call.inputs)
    return Gate(call.name, verification, Floors(-math.inf, -math.inf))


def judge(
    model: PictureModel,
    orders: Sequence[Order],
    options: Mapping[str, Any],
    floors: Floors,
    tell: Tell,
) -> Gate:
    """The oracles on the first call of a pipeline, and its pictures, dense and by the plan.

    Args:
        model: The pipeline, not attached.
        orders: The pictures.
        options: What it is to be served with: a quality, or others that `specdiff.attach` takes.
        floors: What they have to reach.
        tell: Told what is done next.

    Raises:
        OrderError: A picture that the model does not draw.
    """
    for order in orders:
        model.check(order)
    tell("oracles")
    verification = _verified(model, orders[0])
    attachment = specdiff.attach(model.denoiser, **options)
    try:
        dense = [_drawn(model, order, tell, quality=OFF) for order in orders]
        specdiff.reset(model.denoiser)
        planned = [_drawn(model, order, tell) for order in orders]
        stats = specdiff.stats(model.denoiser)
    finally:
        attachment.detach()
    steps = {"dense": stats.dense, "selective": stats.selective, "skipped": stats.skipped}
    likenesses = [
        Likeness(order, psnr(picture, reference))
        for order, picture, reference in zip(orders, planned, dense, strict=True)
    ]
    return Gate(model.name, verification, floors, likenesses, steps, dict(stats.fallbacks))


def read_prompts(file: Path) -> list[str]:
    """The lines of a file, without empty ones.

    Raises:
        SpecdiffError: It cannot be read, or has none.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecdiffError(f"cannot read {file}: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise SpecdiffError(f"{file} holds no prompts: write one on each line")
    return prompts


def _verified(model: PictureModel, order: Order) -> Verification:
    calls: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = []
    hook = model.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        model.draw(Order(order.prompt, order.width, order.height, 1, order.seed))
    finally:
        hook.remove()
    args, kwargs = calls[0]
    return specdiff.verify(model.denoiser, *args, **kwargs)


def _drawn(model: PictureModel, order: Order, tell: Tell, **options: Any) -> Tensor:
    tell(order.prompt)
    pipeline = model.beside(model.denoiser)
    with specdiff.session(model.denoiser, scheduler=pipeline.scheduler, **options):
        return model.draw(order, pipeline)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
