"""The pipeline: the order of the passes, from a Dynamo graph to what is known of it.

normalize -> axes -> selective -> timetable -> invariant -> (quantize) -> regions. Observers (a
dump, tlparse) are told after each pass. A graph without a token-selective form is a reason.
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
from specdiff.passes.base import Notes, Observer, PassRecord, PassRunner
from specdiff.passes.graph.dump import Dump, unfailing
from specdiff.passes.graph.listing import listing
from specdiff.passes.normalize.normalize import DynamoGraph, NormalizePass
from specdiff.passes.plan.axes import AxesPass, AxisFacts
from specdiff.passes.plan.invariant import InvariantPass
from specdiff.passes.plan.quantize import QuantizePass
from specdiff.passes.plan.regions import Region, RegionsPass
from specdiff.passes.plan.selective import SelectivePass
from specdiff.passes.plan.selective_plan import SelectivePlan
from specdiff.passes.plan.signature import build_signature, varying_inputs
from specdiff.passes.plan.timetable import TimetablePass
from specdiff.program import Signature

log = logging.getLogger(__name__)

GRADIENTS = "gradients are required: run under torch.no_grad() to make this model selective"

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


Publish = Callable[[Analysis | str, Dump | None, Options], None]
"""(the analysis or why there is none, where the graph is dumped, options) -> nothing."""


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
    """The first passes: what does not depend on how the graph will be used.

    Raises Unsupported if the graph has no tokens.
    """
    dump = dump_of(options)
    runner = PassRunner(module, observers(dump), verify)
    run = runner.run

    normalized = run(NormalizePass(torch_adapter.export_functional), DynamoGraph(module, inputs))
    axes = run(AxesPass(), normalized)

    return Traced(normalized, axes, runner, dump)


def analyse(traced: Traced, states: Sequence[bool], options: Options) -> Analysis:
    """The other passes: what a selective step of this graph computes.

    `states[i]` says whether input i is a parameter or buffer of the model. Raises Unsupported with
    the reason if there is no plan.
    """
    varying = partial(varying_inputs, states=states, timestep_arg=options.timestep_arg)
    run = traced.runner.run

    plan = run(SelectivePass(), traced.axes)
    plan = run(TimetablePass(varying, torch_adapter.vectorized), plan)
    plan = run(InvariantPass(varying), plan)
    if options.kv_cache_code is not None:
        plan = run(QuantizePass(options.kv_cache_code), plan)
    regions = run(RegionsPass(), plan)

    signature = build_signature(plan, states, options.timestep_arg)
    records = tuple(traced.runner.records)
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
        return GRADIENTS
    return None


def attempt(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    options: Options,
    *,
    verify: bool = False,
    publish: Publish | None = None,
) -> Analysis | str:
    """The analysis of one Dynamo graph of static shapes, or the reason why it runs dense.

    Args:
        module: as Dynamo hands it over.
        inputs: of the graph.
        options: that it is compiled with.
        verify: whether each pass checks its invariants.
        publish: is told the outcome, unless the graph is refused before the first pass or has no
            tokens.
    """
    reason = refusal(inputs)
    if reason is not None:
        return reason
    found = guarded(lambda: trace(module, inputs, options, verify))
    if isinstance(found, str):
        return found
    outcome = concluded(found, module_states(module, inputs), options)
    if publish is not None:
        publish(outcome, found.dump, options)
    return outcome


def concluded(traced: Traced, states: Sequence[bool], options: Options) -> Analysis | str:
    """The analysis of a graph with tokens, or the reason why it runs dense."""
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
