"""A model traced once through every pass, for the oracles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from math import inf
from typing import Any
from unittest.mock import patch

import torch
from torch import fx, nn

from specdiff import compiler, pipeline
from specdiff.options import Options
from specdiff.passes.emit.lower import LoweredPrograms
from specdiff.passes.select.quantize import quantized
from specdiff.passes.select.signature import cache_slots
from specdiff.pipeline import Analysis


def small_tables() -> AbstractContextManager[object]:
    """In here a small model looks up by timestep whatever a large one would."""
    return patch.multiple("specdiff.passes.select.timetable", LEAST=1, MOST=inf)


@dataclass
class Traced:
    """One traced model: its analysis, and the flat inputs of each call it was traced with."""

    analysis: Analysis
    flat: list[Sequence[Any]]

    def programs(self, inner_backend: str = "eager") -> LoweredPrograms:
        """Fresh programs of the analysis."""
        options = Options(ablation={"importance_queries": None}, inner_backend=inner_backend)
        return compiler.lowered_programs(self.analysis, options, {})

    def coded(self, code: torch.dtype | None) -> Traced:
        """The same with key/value caches of that dtype, as the compiler would have it."""
        selection = quantized(self.analysis.selection, code)
        signature = replace(self.analysis.signature, caches=cache_slots(selection))
        return replace(
            self, analysis=replace(self.analysis, selection=selection, signature=signature)
        )


def analyse_graph(module: fx.GraphModule, values: Sequence[Any]) -> Analysis:
    """Every pass on one Dynamo graph, each verified."""
    traced = pipeline.trace(module, values, Options(), verify=True)
    return pipeline.analyse(traced, pipeline.module_states(module, values), Options())


def trace(model: nn.Module, *calls: dict[str, Any]) -> Traced:
    """Trace `model` once through Dynamo and every pass, each verified; run every call."""
    analyses: list[Analysis] = []
    flat: list[Sequence[Any]] = []

    def backend(module: fx.GraphModule, values: Sequence[Any]) -> Callable[..., Any]:
        analyses.append(analyse_graph(module, values))

        def run(*arguments: Any) -> Any:
            flat.append(arguments)
            return module(*arguments)

        return run

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for call in calls:
            compiled(**call)
    assert len(analyses) == 1
    return Traced(analyses[0], flat)
