"""`specdiff.explain`: a model traced and reported on, nothing compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from specdiff import torch_adapter
from specdiff.inspect.publish import publish
from specdiff.inspect.report import Report, report_of
from specdiff.options import Options
from specdiff.pipeline import trace_and_analyse


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
        reports.append(report_of(trace_and_analyse(module, inputs, known, publish=publish), known))
        return module.forward

    with torch.no_grad():
        torch_adapter.trace_once(getattr(model, "_orig_mod", model), collect, args, kwargs)
    if not reports:
        return Report(False, "the model was not traced: Dynamo found no tensor operation")
    return next((report for report in reports if report.selective), reports[0])
