"""What `specdiff tune` does with its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from specdiff.errors import SpecdiffError
from specdiff.evaluation.candidates import REFERENCE_STEPS
from specdiff.evaluation.features import feature_distance, features
from specdiff.measure.comparison import psnr
from specdiff.measure.machine import usable_device
from specdiff.measure.progress import progress_bar
from specdiff.models.subject import Subject, find_subject
from specdiff.tuning.trials import Likeness, Tell
from specdiff.tuning.tuner import TUNED_OPTIONS, Tuned, tune


def _negative_distance(picture: Tensor, reference: Tensor) -> float:
    """Of deep features, so that higher is closer; pictures `[H, W, 3]`."""
    seen, expected = (features(one.permute(2, 0, 1)[None]) for one in (picture, reference))
    return -float(feature_distance(seen, expected))


MEASURES: Mapping[str, tuple[Likeness, int, float]] = {
    "psnr": (psnr, 1, 40.0),
    "features": (_negative_distance, -1, 0.15),
}
"""How to judge, the sign by which higher is closer, and what to keep if nothing is said."""


@dataclass(frozen=True)
class Tuning:
    """The options of `specdiff tune`; see its help."""

    model: str
    weights: Path | None
    device: str
    measure: str
    target: float | None
    prompts: int
    held_back: int
    budget: int
    steps: int
    options: Mapping[str, Any]
    solution: bool = False


def tune_subject(wanted: Tuning, console: Console) -> Tuned:
    """Tune on a shipped subject behind a progress bar.

    Raises:
        SpecdiffError: An option has no such value.
    """
    if wanted.measure not in MEASURES:
        raise SpecdiffError(f"no measure {wanted.measure!r}: choose from {', '.join(MEASURES)}")
    likeness, sign, usual = MEASURES[wanted.measure]
    usual_target = None if wanted.solution else sign * usual
    target = usual_target if wanted.target is None else sign * wanted.target
    subject = find_subject(wanted.model, wanted.weights, usable_device(wanted.device))
    with progress_bar(console, wanted.budget, "compiling") as update:

        def tell(spent: int, line: str) -> None:
            update(completed=spent, description=line)

        return _tune(wanted, subject, likeness, target, tell)


def _tune(
    wanted: Tuning, subject: Subject, likeness: Likeness, target: float | None, tell: Tell
) -> Tuned:
    pipeline = subject.load()
    requests = subject.tuning_requests(wanted.prompts + wanted.held_back)
    options = {**subject.options, **wanted.options}
    tuned_with = {name: options.pop(name) for name in TUNED_OPTIONS if name in options}
    compiled: Any = torch.compile(
        pipeline.transformer, backend="specdiff", fullgraph=True, options=options
    )
    pipeline.transformer = compiled

    def draw(index: int, steps: int = wanted.steps) -> Tensor:
        return subject.picture(subject.draw(pipeline, requests[index], steps))

    return tune(
        compiled,
        draw,
        target=target,
        solve=partial(draw, steps=REFERENCE_STEPS) if wanted.solution else None,
        prompts=wanted.prompts,
        held_back=wanted.held_back,
        likeness=likeness,
        budget=wanted.budget,
        tell=tell,
        **tuned_with,
    )
