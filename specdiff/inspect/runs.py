"""Runs: pages of recorded runs, of any pipeline and of the demo's comparison."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from specdiff.inspect.page import drawings, environment, report_facts
from specdiff.inspect.report import Report
from specdiff.inspect.steps import (
    CLASS_NAMES,
    VEILS,
    changed,
    kinds_of,
    picture,
    recorded_steps,
    share_computed,
)
from specdiff.measure.comparison import Comparison, Trials
from specdiff.measure.machine import MachineRates
from specdiff.runtime.records.recording import Recording, StepRecord

Runs = Mapping[str, Sequence[Sequence[StepRecord]]]
"""By the name of a method: the steps of each picture that it drew."""


def recording_page(recording: Recording, image: Tensor | None = None, sample: int = 0) -> str:
    """One recorded run as HTML.

    Args:
        recording: What `specdiff.record` yielded. Its last generation is shown, or all of its
            steps if they belong to no generation.
        image: The decoded picture [H, W, 3] in 0..1, on which classes of tokens are drawn.
        sample: Which sample of the batch is shown.

    Raises:
        ValueError: Nothing was recorded.
    """
    if not recording.steps:
        raise ValueError("nothing was recorded: call the model inside `with specdiff.record(...)`")
    generations = recording.generations()
    steps = generations[-1] if generations else recording.steps
    template = environment().get_template("run.html")
    return template.render(
        steps=recorded_steps(steps, image, sample),
        counts=kinds_of(steps),
        share=share_computed(steps),
        image=None if image is None else picture(image),
        class_names=CLASS_NAMES,
        veils=VEILS,
    )


def comparison_page(
    comparison: Comparison, report: Report, runs: Runs, rates: MachineRates, hints: Sequence[str]
) -> str:
    """The demo's comparison as HTML: what was skipped, what that saved, and what it cost.

    Args:
        comparison: Times and pictures; the first method is the reference, the second is specdiff.
        report: Of the model.
        runs: Recorded steps of methods.
        rates: Of this machine.
        hints: Warnings for the reader.
    """
    reference, ours = comparison.trials[:2]
    template = environment().get_template("demo.html")
    return template.render(
        facts=report_facts(report, rates, reference.method.steps),
        drawings=drawings(report),
        prompts=[request.prompt for request in comparison.requests],
        methods=[_method(comparison, trials) for trials in comparison.trials],
        ours=_method(comparison, ours),
        reference=_method(comparison, reference),
        rival=_rival(comparison, ours),
        pictures=[_row(comparison, i) for i in range(len(comparison.requests))],
        runs=[_run(comparison, trials, runs) for trials in comparison.trials],
        class_names=CLASS_NAMES,
        veils=VEILS,
        hints=hints,
    )


def _method(comparison: Comparison, trials: Trials) -> dict[str, Any]:
    return {
        "name": trials.method.name,
        "steps": trials.method.steps,
        "seconds": trials.median_seconds,
        "speedup": comparison.speedup(trials),
        "tokens": comparison.tokens_share(trials),
        "cache": trials.cache_bytes,
        "compile": trials.compile_seconds,
        "psnr": trials.psnr if math.isfinite(trials.psnr) else None,
        "ssim": trials.ssim,
        "is_reference": trials is comparison.reference,
        "is_specdiff": trials.method.usage is not None,
        "fallbacks": dict(trials.fallbacks),
    }


def _rival(comparison: Comparison, ours: Trials) -> dict[str, Any] | None:
    """Of the dense runs with fewer steps, the one that takes about as long."""
    shorter = [t for t in comparison.trials[1:] if t.method.usage is None]
    if not shorter:
        return None
    best = min(shorter, key=lambda t: abs(t.median_seconds - ours.median_seconds))
    return _method(comparison, best)


def _row(comparison: Comparison, index: int) -> list[dict[str, Any]]:
    """One prompt: each method's picture, and how it differs from the reference's."""
    reference = comparison.reference
    cells = []
    for trials in comparison.trials:
        image, quality = trials.images[index], trials.qualities[index]
        cells.append(
            {
                "name": trials.method.name,
                "image": picture(image),
                "changed": changed(image, reference.images[index]),
                "seconds": statistics.median(trials.seconds[index]),
                "psnr": quality.psnr if math.isfinite(quality.psnr) else None,
                "ssim": quality.ssim,
                "is_reference": trials is reference,
            }
        )
    return cells


def _run(comparison: Comparison, trials: Trials, runs: Runs) -> dict[str, Any]:
    """The recorded steps of one method, for every prompt; none if it was not recorded."""
    recorded = runs.get(trials.method.name, ())
    return {
        "name": trials.method.name,
        "options": dict(trials.method.options),
        "counts": kinds_of([step for steps in recorded for step in steps]),
        "share": comparison.tokens_share(trials),
        "pictures": [
            recorded_steps(steps, image)
            for steps, image in zip(recorded, trials.images, strict=False)
        ],
    }
