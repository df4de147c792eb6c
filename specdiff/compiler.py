"""The entry point: what `torch.compile(model, backend="specdiff")` calls for each graph.

normalize -> axes -> selective -> invariant -> regions -> lower -> runtime. A graph that has no
token-selective form runs as it came, through the same inner compiler, and the reason is kept and
logged.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import fx

from specdiff import torch_adapter
from specdiff.errors import Unsupported
from specdiff.options import Options
from specdiff.passes.axes import AxesPass, AxisFacts
from specdiff.passes.base import Notes, Observer, PassRecord, PassRunner
from specdiff.passes.block import plan_block, work_of
from specdiff.passes.dump import Dump, unfailing
from specdiff.passes.invariant import InvariantPass
from specdiff.passes.listing import listing
from specdiff.passes.lower import BlockPrograms, LoweredPrograms
from specdiff.passes.lower import Compiler as ProgramCompiler
from specdiff.passes.normalize import DynamoGraph, NormalizePass
from specdiff.passes.quantize import QuantizePass, quantized
from specdiff.passes.regions import Region, RegionsPass
from specdiff.passes.selective import SelectivePass, SelectivePlan
from specdiff.passes.share import share_repeats
from specdiff.passes.signature import build_signature, varying_inputs
from specdiff.passes.specialise import floats_of, specialise
from specdiff.program import Signature
from specdiff.runtime.dispatch import DenseOnly, Runtime
from specdiff.runtime.regional import Block
from specdiff.runtime.shapes import PerShape

log = logging.getLogger(__name__)

ALL_QUERIES = 1 << 62
CHANGING = "numbers in the graph, such as an adapter's strength, change too often to compile for"
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
    plan = runner.run(InvariantPass(varying), selected)
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


def attempt(
    module: fx.GraphModule, inputs: Sequence[Any], options: Options, verify: bool = False
) -> Analysis | str:
    """The analysis of one Dynamo graph of static shapes, or the reason why it runs dense."""
    reason = refusal(inputs)
    if reason is not None:
        return reason
    found = guarded(lambda: trace(module, inputs, options, verify))
    if isinstance(found, str):
        return found
    return concluded(found, module_states(module, inputs), options)


def concluded(traced: Traced, states: Sequence[bool], options: Options) -> Analysis | str:
    """The analysis of a graph with tokens, or why it has none, told to whoever watches."""
    found = guarded(lambda: analyse(traced, states, options))
    log.debug("%s", f"runs dense: {found}" if isinstance(found, str) else "has a selective form")
    publish(found, traced.dump, options)
    return found


def publish(found: Analysis | str, dump: Dump | None, options: Options) -> None:
    """Drawings and report of a graph, for the dump and for tlparse; nothing it does can fail."""
    if dump is None and not torch_adapter.traces_artifacts():
        return
    from specdiff.inspect import export

    def work() -> None:
        for name, text in export.texts(found, options):
            torch_adapter.trace_artifact(f"specdiff_{name}", text)
            if dump is not None:
                (dump.folder / name).write_text(text, encoding="utf-8")

    unfailing(work)


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
        return f"internal error: {type(error).__name__}: {error}"


def specdiff_backend(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph; the signature is that of a `torch.compile` backend.

    Raises OptionError for an unknown or invalid option (Dynamo wraps it in BackendCompilerFailed).
    """
    known, settings = Options.parse(dict(options or {}), torch_adapter.inductor_keys())
    settings = {**torch_adapter.mode_settings(settings.pop("mode", mode)), **settings}
    states = module_states(module, inputs)
    symbolic, floats = torch_adapter.symbolic_inputs(inputs), floats_of(module)
    reason = refusal(inputs)
    if (symbolic or floats) and reason is None:
        specialised = partial(at_shape, module, states, known, settings)
        changing = DenseOnly(module.forward, CHANGING, parameters_among(states))
        return PerShape(symbolic, floats, specialised, changing)
    traced: Traced | str
    traced = guarded(lambda: trace(module, inputs, known)) if reason is None else reason
    if isinstance(traced, Traced):
        return answer(module, traced, states, known, settings)
    compiled = torch_adapter.compile_untouched(module, inputs, known.inner_backend, settings)
    return DenseOnly(compiled, traced, parameters_among(states))


def at_shape(
    module: fx.GraphModule,
    states: Sequence[bool],
    options: Options,
    settings: Mapping[str, Any],
    inputs: Sequence[Any],
) -> Callable[..., Any]:
    """What answers a graph with symbolic sizes where its inputs have those of `inputs`."""
    static = specialise(module, inputs, torch_adapter.copy_graph)
    traced = guarded(lambda: trace(static, torch_adapter.static_fakes(inputs), options))
    if isinstance(traced, Traced):
        return answer(static, traced, states, options, settings)
    return DenseOnly(when_needed(static, options, settings), traced, parameters_among(states))


def answer(
    module: fx.GraphModule,
    traced: Traced,
    states: Sequence[bool],
    options: Options,
    settings: Mapping[str, Any],
) -> Block:
    """What answers a graph with tokens: alone, or as a block of an attached root.

    Everything is compiled when it is first run.
    """
    parameters = parameters_among(states)
    dense = when_needed(module, options, settings)
    found = concluded(traced, states, options)
    alone: Callable[..., Any]
    if isinstance(found, Analysis):
        alone = selective_runtime(found, options, settings)
    else:
        alone = DenseOnly(dense, found, parameters)
    compiler = program_compiler(traced.dump, options, settings)

    def planned(tokens: int) -> BlockPrograms:
        plan = guarded(
            lambda: quantized(plan_block(traced.axes, tokens, states), options.kv_cache_code)
        )
        if isinstance(plan, str):
            raise Unsupported(plan)
        return BlockPrograms(traced.module, plan, sample_of(options), compiler)

    classes = traced.axes.classes
    lengths = [classes.size(segment) for segment in traced.axes.segments]
    work = work_of(traced.module.graph)
    return Block(alone, dense, module.forward, lengths, planned, parameters, work)


def when_needed(
    module: fx.GraphModule, options: Options, settings: Mapping[str, Any]
) -> Callable[..., Any]:
    """A Dynamo graph as it came, compiled at its first call."""
    compiled: list[Callable[[Sequence[Any]], Any]] = []

    def run(*values: Any) -> Any:
        if not compiled:
            inner = options.inner_backend
            compiled.append(torch_adapter.compile_program(module, values, inner, settings))
        return compiled[0](values)

    return run


def parameters_among(states: Sequence[bool]) -> tuple[int, ...]:
    """Positions of parameters and buffers among the inputs."""
    return tuple(i for i, state in enumerate(states) if state)


def selective_runtime(analysis: Analysis, options: Options, settings: Mapping[str, Any]) -> Runtime:
    """The runtime of an analysed graph."""
    return Runtime(programs_of(analysis, options, settings), options)


def programs_of(
    analysis: Analysis, options: Options, settings: Mapping[str, Any]
) -> LoweredPrograms:
    """The programs of an analysed graph, each compiled when it is first run."""
    compiler = program_compiler(analysis.dump, options, settings)
    return LoweredPrograms(
        analysis.module, analysis.plan, analysis.signature, sample_of(options), compiler
    )


def program_compiler(
    dump: Dump | None, options: Options, settings: Mapping[str, Any]
) -> ProgramCompiler:
    """Hands emitted programs to the inner compiler, after telling the observers."""

    def compiler(name: str, program: fx.GraphModule, values: Sequence[Any]) -> Any:
        record: PassRecord = program.meta["record"]
        log.debug("%s", record)
        for observer in observers(dump):
            observer(record, program, {})

        def compiled(program: fx.GraphModule) -> Any:
            return torch_adapter.compile_program(program, values, options.inner_backend, settings)

        shares = options.inner_backend == "inductor"
        found = compile_shared(name, program, compiled) if shares else None
        return found or compiled(program)

    return compiler


def compile_shared(
    name: str, program: fx.GraphModule, compiled: Callable[[fx.GraphModule], Any]
) -> Any:
    """The program with blocks that repeat compiled once; None if none do, or it cannot be had.

    Inductor refuses calls of graphs under some of its options, such as `cpp_wrapper`.
    """
    try:
        shared, graphs = share_repeats(program, torch_adapter.SHARED_CALL)
        for each in graphs:
            log.debug("program %s: %s", name, each)
        return compiled(shared) if graphs else None
    except Exception as error:
        if torch_adapter.is_restart(error):
            raise
        log.info("program %s: blocks are not shared, for that raised %r", name, error)
        return None


def sample_of(options: Options) -> int:
    """Attention rows that measure importance."""
    return options.importance_queries or ALL_QUERIES


def backend(**options: Any) -> Callable[..., Any]:
    """A configured backend: `torch.compile(model, backend=specdiff.backend(cache_ratio=0.9))`.

    Unlike `options=`, this goes together with `mode=`. Raises OptionError at once.
    """
    Options.parse(options, torch_adapter.inductor_keys())
    return partial(specdiff_backend, options=options)
