"""Analysis: what the passes find in one graph, before anything is compiled.

normalize -> axes -> selective -> timetable -> invariant -> (quantize) -> regions. Whoever watches
(a dump, tlparse, the log) is told after each pass, and of the outcome. What has no token-selective
form is a reason.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import fx

from specdiff import torch_adapter
from specdiff.errors import Unsupported, described
from specdiff.options import Options
from specdiff.passes.axes import AxesPass, AxisFacts
from specdiff.passes.base import Notes, Observer, PassRecord, PassRunner
from specdiff.passes.dump import Dump, unfailing
from specdiff.passes.invariant import InvariantPass
from specdiff.passes.listing import listing
from specdiff.passes.normalize import DynamoGraph, NormalizePass
from specdiff.passes.quantize import QuantizePass
from specdiff.passes.regions import Region, RegionsPass
from specdiff.passes.selective import SelectivePass, SelectivePlan
from specdiff.passes.signature import build_signature, varying_inputs
from specdiff.passes.timetable import TimetablePass
from specdiff.program import Signature

log = logging.getLogger(__name__)

Found = TypeVar("Found")


@dataclass(frozen=True)
class Analysis:
    """What the compiler found in one graph."""

    module: fx.GraphModule
    plan: SelectivePlan
    regions: tuple[Region, ...]
    signature: Signature
    records: tuple[PassRecord, ...]
    dump: Dump | None = None


@dataclass(frozen=True)
class Traced:
    """A graph whose tokens were found, before anything is decided about them."""

    module: fx.GraphModule
    axes: AxisFacts
    runner: PassRunner
    dump: Dump | None


def trace(
    module: fx.GraphModule, inputs: Sequence[Any], options: Options, verify: bool = False
) -> Traced:
    """Normalize and find tokens. Raises Unsupported if there are none."""
    dump = dump_of(options)
    runner = PassRunner(module, observers(dump), verify)
    normalized = runner.run(
        NormalizePass(torch_adapter.export_functional), DynamoGraph(module, inputs)
    )
    return Traced(normalized, runner.run(AxesPass(), normalized), runner, dump)


def analyse(traced: Traced, states: Sequence[bool], options: Options) -> Analysis:
    """The remaining passes. Raises Unsupported with the reason if there is no plan.

    `states[i]` says whether input i is a parameter or buffer of the model.
    """
    runner = traced.runner
    selected = runner.run(SelectivePass(), traced.axes)
    varying = partial(varying_inputs, states=states, timestep_arg=options.timestep_arg)
    tabulated = runner.run(TimetablePass(varying, torch_adapter.vectorized), selected)
    plan = runner.run(InvariantPass(varying), tabulated)
    if options.kv_cache_code is not None:
        plan = runner.run(QuantizePass(options.kv_cache_code), plan)
    regions = runner.run(RegionsPass(), plan)
    signature = build_signature(plan, states, options.timestep_arg)
    records = tuple(runner.records)
    for record in records:
        log.debug("%s", record)
    return Analysis(traced.module, plan, regions, signature, records, traced.dump)


def dump_of(options: Options) -> Dump | None:
    """Where this graph is dumped: below `dump_dir`, or else below the variable SPECDIFF_DUMP."""
    place = options.dump_dir or os.environ.get("SPECDIFF_DUMP")
    return Dump.below(Path(place)) if place else None


def observers(dump: Dump | None) -> list[Observer]:
    """Who is told what each pass left."""
    found: list[Observer] = [] if dump is None else [dump.observe]
    if torch_adapter.traces_artifacts():
        found.append(trace_pass)
    return found


def trace_pass(record: PassRecord, module: fx.GraphModule, notes: Notes) -> None:
    """The code after a pass, for tlparse."""
    name = f"specdiff_{record.name}"
    unfailing(lambda: torch_adapter.trace_artifact(name, listing(module, str(record), notes)))


def module_states(module: fx.GraphModule, inputs: Sequence[Any]) -> list[bool]:
    """For each flat input, whether it is a parameter or buffer of the model."""
    placeholders = module.graph.find_nodes(op="placeholder")
    return [
        torch_adapter.is_module_state(node, value)
        for node, value in zip(placeholders, inputs, strict=True)
    ]


def refusal(inputs: Sequence[Any]) -> str | None:
    """Why a graph is not even analysed, or None."""
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "gradients are required: run under torch.no_grad() to make this model selective"
    return None


def concluded(traced: Traced, states: Sequence[bool], options: Options) -> Analysis | str:
    """The analysis of a graph with tokens, or why it has none."""
    found = guarded(lambda: analyse(traced, states, options))
    log.debug("%s", f"runs dense: {found}" if isinstance(found, str) else "has a selective form")
    return found


def guarded(work: Callable[[], Found]) -> Found | str:
    """What `work` returns, or why the graph runs dense: no fault of ours reaches the user."""
    try:
        return work()
    except Unsupported as error:
        return str(error)
    except Exception as error:
        if torch_adapter.is_restart(error):
            raise
        log.warning("specdiff failed on a graph, which runs dense", exc_info=True)
        return f"internal error: {described(error)}"
