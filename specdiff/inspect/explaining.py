"""`specdiff.explain`: a model traced and reported on, nothing compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from specdiff import torch_adapter
from specdiff.errors import Unsupported
from specdiff.inspect.publish import publish
from specdiff.inspect.report import Report, report_of
from specdiff.options import Options
from specdiff.pipeline import Analysis, module_states, trace_and_analyse, whole_steps
from specdiff.program import Signature

UNTRACED = "the model was not traced: Dynamo found no tensor operation"
BROKEN = "the model breaks into graphs (specdiff.attach(model) forecasts its whole steps)"


def explain(
    model: nn.Module, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Trace `model` on these inputs and report what would be skipped.

    The model runs once, eagerly. Models that break into several graphs are reported by their
    first graph that has attention, or else by their first.

    Args:
        model: The model, compiled or not.
        args: Its inputs, and `kwargs` those by name.
        options: As of `torch.compile(options=...)`, for the schedule and the dumps; a mapping, as
            keywords are the model's inputs.
        kwargs: Inputs by name.

    Raises:
        OptionError: An unknown option or a value out of range.
    """
    known, _ = Options.parse(dict(options or {}), torch_adapter.inductor_keys())
    reports: list[Report] = []

    def collect(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        analysis = trace_and_analyse(module, inputs, known, publish=publish)
        reports.append(report_of(analysis, known, _whole_steps(module, inputs, known, analysis)))
        return module.forward

    with torch.no_grad():
        torch_adapter.trace_once(getattr(model, "_orig_mod", model), collect, args, kwargs)
    if not reports:
        return Report(False, UNTRACED, UNTRACED)
    best = next((report for report in reports if report.selective), reports[0])
    if best.selective or len(reports) == 1:
        return best
    return dataclasses.replace(best, no_step_plan=BROKEN, kept_bytes=0)


def _whole_steps(
    module: fx.GraphModule, inputs: Sequence[Any], options: Options, analysis: Analysis | str
) -> Signature | str | None:
    """Of a graph without analysis: what forecasting its whole steps takes, or why it cannot be."""
    if not isinstance(analysis, str):
        return None
    try:
        is_state = module_states(module, inputs)
        return whole_steps(module, inputs, is_state, options.timestep_arg, analysis)
    except Unsupported as error:
        return str(error)
