"""The pipeline: in what order the passes turn a Dynamo graph into an `Analysis`.

    normalize -> axes -> select -> timetable -> invariant -> (quantize) -> regions

After each pass, observers (a dump, tlparse) get the graph. Where a graph has no token-selective
form, the result is the reason, as text.
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
from specdiff.boundary import Leaf, step_signature
from specdiff.errors import Unsupported, described
from specdiff.options import Options
from specdiff.passes.base import Notes, Observer, PassRecord, PassRunner
from specdiff.passes.graph.dump import Dump, unfailing
from specdiff.passes.graph.in_place import writes_to_inputs
from specdiff.passes.graph.python_file import to_python
from specdiff.passes.normalize.normalize import DynamoGraph, NormalizePass
from specdiff.passes.select.axes import AxesPass, AxisFacts
from specdiff.passes.select.input_roles import is_item, short_name
from specdiff.passes.select.invariant import InvariantPass
from specdiff.passes.select.quantize import QuantizePass
from specdiff.passes.select.regions import Region, RegionsPass
from specdiff.passes.select.select import SelectPass
from specdiff.passes.select.selection import Selection
from specdiff.passes.select.signature import build_signature, varying_inputs
from specdiff.passes.select.timetable import TimetablePass
from specdiff.program import Signature

log = logging.getLogger(__name__)

GRADIENTS = "gradients are required: run under torch.no_grad() to make this model selective"

Result = TypeVar("Result")


@dataclass(frozen=True)
class Analysis:
    """What the compiler found in one graph."""

    module: fx.GraphModule
    selection: Selection
    regions: tuple[Region, ...]
    signature: Signature
    records: tuple[PassRecord, ...]
    dump: Dump | None = None


Publish = Callable[[Analysis | str, Dump | None, Options], None]
"""(the analysis or why there is none, where the graph is dumped, options) -> nothing."""


@dataclass(frozen=True)
class Traced:
    """A graph whose tokens are known; nothing is decided about them yet."""

    module: fx.GraphModule
    axes: AxisFacts
    runner: PassRunner
    dump: Dump | None


def trace(
    module: fx.GraphModule, inputs: Sequence[Any], options: Options, verify: bool = False
) -> Traced:
    """Run the first passes, which do not depend on how the graph will be used.

    Raises Unsupported if the graph has no tokens.
    """
    dump = dump_of(options)
    runner = PassRunner(module, observers(dump), verify)
    run = runner.run

    normalized = run(NormalizePass(torch_adapter.export_functional), DynamoGraph(module, inputs))
    axes = run(AxesPass(), normalized)

    return Traced(normalized, axes, runner, dump)


def analyse(traced: Traced, is_state: Sequence[bool], options: Options) -> Analysis:
    """Run the other passes: they decide what a selective step of this graph computes.

    `is_state[i]` says whether input i is a parameter or buffer of the model. Raises Unsupported
    with the reason if the graph has no selective form.
    """
    varying = partial(varying_inputs, is_state=is_state, timestep_arg=options.timestep_arg)
    run = traced.runner.run

    selection = run(SelectPass(), traced.axes)
    selection = run(TimetablePass(varying, torch_adapter.vectorized), selection)
    selection = run(InvariantPass(varying), selection)
    if options.kv_cache_code is not None:
        selection = run(QuantizePass(options.kv_cache_code), selection)
    regions = run(RegionsPass(), selection)

    signature = build_signature(selection, is_state, options.timestep_arg)
    records = tuple(traced.runner.records)
    for record in records:
        log.debug("%s", record)
    return Analysis(traced.module, selection, regions, signature, records, traced.dump)


def dump_of(options: Options) -> Dump | None:
    """A new folder below `dump_dir`, or else below $SPECDIFF_DUMP; None if neither is set."""
    place = options.dump_dir or os.environ.get("SPECDIFF_DUMP")
    return Dump.below(Path(place)) if place else None


def observers(dump: Dump | None) -> list[Observer]:
    """Who gets the graph after each pass."""
    watching: list[Observer] = [] if dump is None else [dump.observe]
    if torch_adapter.traces_artifacts():
        watching.append(trace_pass)
    return watching


def trace_pass(record: PassRecord, module: fx.GraphModule, notes: Notes) -> None:
    """Hand the code after a pass to tlparse."""
    name = f"specdiff_{record.name}"
    unfailing(lambda: torch_adapter.trace_artifact(name, to_python(module, str(record), notes)))


def whole_steps(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    is_state: Sequence[bool],
    timestep_arg: str | None,
    unselectable: str,
) -> Signature:
    """What forecasting whole steps of a graph takes.

    Args:
        module: the graph as Dynamo hands it over.
        inputs: an example of its inputs.
        is_state: which of them are parameters or buffers.
        timestep_arg: name of the time, None for the usual ones.
        unselectable: why no tokens can be selected.

    Raises:
        Unsupported: it has no boundary, or none of its calls may be left out.
    """
    if unselectable == GRADIENTS:
        raise Unsupported(GRADIENTS)
    if unselectable == torch_adapter.WRITES_TO_INPUTS or writes_to_inputs(module.graph):
        raise Unsupported(torch_adapter.WRITES_TO_INPUTS)
    leaves = [
        Leaf(short_name(source), value, held, is_item(source))
        for source, value, held in zip(torch_adapter.sources(module), inputs, is_state, strict=True)
    ]
    outputs = torch_adapter.example_outputs(module, inputs)
    return step_signature(leaves, outputs, timestep_arg, unselectable)


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


def trace_and_analyse(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    options: Options,
    *,
    verify: bool = False,
    publish: Publish | None = None,
) -> Analysis | str:
    """Analyse one Dynamo graph of static shapes; return why it runs dense if it must.

    Args:
        module: the graph as Dynamo hands it over.
        inputs: the graph's inputs.
        options: the backend's options.
        verify: whether each pass checks its invariants.
        publish: gets the outcome, unless the graph is refused before the first pass or has no
            tokens.
    """
    reason = refusal(inputs)
    if reason is not None:
        return reason
    traced = or_reason(lambda: trace(module, inputs, options, verify))
    if isinstance(traced, str):
        return traced
    outcome = analyse_or_reason(traced, module_states(module, inputs), options)
    if publish is not None:
        publish(outcome, traced.dump, options)
    return outcome


def analyse_or_reason(traced: Traced, is_state: Sequence[bool], options: Options) -> Analysis | str:
    """The analysis of a graph with tokens, or the reason why it runs dense."""
    outcome = or_reason(lambda: analyse(traced, is_state, options))
    dense = isinstance(outcome, str)
    log.debug("%s", f"runs dense: {outcome}" if dense else "has a selective form")
    return outcome


def or_reason(work: Callable[[], Result]) -> Result | str:
    """Return what `work` returns, or why the graph runs dense if it raises.

    A bug of ours is logged and never reaches the user; only Dynamo's own restarts pass through.
    """
    try:
        return work()
    except Unsupported as error:
        return str(error)
    except Exception as error:
        if torch_adapter.is_restart(error):
            raise
        log.warning("specdiff failed on a graph, which runs dense", exc_info=True)
        return f"internal error: {described(error)}"
