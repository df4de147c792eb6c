"""The methods that the demo compares, each with a pipeline and compiled weights of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdiff import torch_adapter
from specdiff.measure.comparison import Method
from specdiff.models.demo import built_in_prompts
from specdiff.models.subject import Request, Subject
from specdiff.options import Options
from specdiff.runtime.api import record, stats
from specdiff.runtime.records.recording import StepRecord

BUILT_IN = 4
"""Built-in prompts drawn when none is given: as many rows as a screen shows."""


@dataclass(frozen=True)
class DemoRun:
    """What all methods of one run of the demo share.

    Attributes:
        subject: The demo's pipeline.
        steps: Denoising steps of one picture.
        options: On top of the defaults; settings of Inductor among them are for all.
    """

    subject: Subject
    steps: int
    options: Mapping[str, object]


def demo_requests(prompts: Sequence[str], seed: int) -> list[Request]:
    """One picture a prompt, each with a seed of its own; a few built-in ones if none is given."""
    chosen = prompts or built_in_prompts()[:BUILT_IN]
    return [Request(prompt, seed + index) for index, prompt in enumerate(chosen)]


def picture_maker(pipeline: Any, setting: DemoRun, steps: int) -> Callable[[Request], Tensor]:
    """Bind a pipeline to a number of steps; pictures end on the CPU, so nothing is left untimed."""
    subject = setting.subject
    return lambda request: subject.picture(subject.draw(pipeline, request, steps))


def compiled_pipeline(setting: DemoRun, **compile_arguments: Any) -> Any:
    """The demo pipeline with its transformer compiled, one graph or an error."""
    pipeline = setting.subject.load()
    pipeline.transformer = torch.compile(pipeline.transformer, fullgraph=True, **compile_arguments)
    return pipeline


def dense_methods(setting: DemoRun, fewer_steps: Sequence[int]) -> tuple[Method, list[Method]]:
    """The reference, and the same compiled model run for fewer steps."""
    _, given = Options.parse(setting.options, torch_adapter.inductor_keys())
    settings = torch_adapter.inductor_settings(given)
    pipeline = compiled_pipeline(setting, backend="inductor", options=settings)
    reference = Method("dense", setting.steps, picture_maker(pipeline, setting, setting.steps))
    shorter = [
        Method(
            f"dense, {steps} steps", steps, picture_maker(pipeline, setting, steps), compiles=False
        )
        for steps in fewer_steps
    ]
    return reference, shorter


def _selective(setting: DemoRun, name: str, options: Mapping[str, object]) -> Method:
    pipeline = compiled_pipeline(setting, backend="specdiff", options=dict(options))
    compiled = pipeline.transformer
    generate = picture_maker(pipeline, setting, setting.steps)
    return Method(
        name,
        setting.steps,
        generate,
        lambda: stats(compiled),
        options,
        model=compiled,
    )


def demo_methods(setting: DemoRun, fewer_steps: Sequence[int] = ()) -> list[Method]:
    """Dense first, then specdiff with the options, with `method="paper"`, then fewer steps.

    Nothing is compiled yet: that happens with the first picture of each.
    """
    reference, shorter = dense_methods(setting, fewer_steps)
    default = _selective(setting, "specdiff", setting.options)
    paper = _selective(setting, "specdiff, paper", {**setting.options, "method": "paper"})
    return [reference, default, paper, *shorter]


def record_methods(
    methods: Sequence[Method], requests: Sequence[Request]
) -> dict[str, list[list[StepRecord]]]:
    """Draw every picture once more and record each step, where a method can be recorded."""
    recorded: dict[str, list[list[StepRecord]]] = {}
    for method in methods:
        for request in requests if method.model is not None else ():
            assert method.model is not None
            with record(method.model) as recording:
                method.generate(request)
            recorded.setdefault(method.name, []).append(recording.steps)
    return recorded
