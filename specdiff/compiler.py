"""The entry point: what `torch.compile(model, backend="specdiff")` calls for each graph.

normalize -> axes -> selective -> regions -> lower -> runtime. A graph that has no token-selective
form runs as it came, through the same inner compiler, and the reason is kept and logged.
"""

from __future__ import annotations

import itertools
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
from specdiff.passes.base import PassRecord, PassRunner
from specdiff.passes.block import plan_block
from specdiff.passes.lower import BlockPrograms, LoweredPrograms
from specdiff.passes.lower import Compiler as ProgramCompiler
from specdiff.passes.normalize import DynamoGraph, NormalizePass
from specdiff.passes.regions import Region, RegionsPass
from specdiff.passes.selective import SelectivePass, SelectivePlan
from specdiff.passes.signature import build_signature
from specdiff.passes.specialise import floats_of, specialise
from specdiff.program import Signature
from specdiff.runtime.dispatch import DenseOnly, Runtime
from specdiff.runtime.regional import Block
from specdiff.runtime.shapes import PerShape

log = logging.getLogger(__name__)

ALL_QUERIES = 1 << 62
Found = TypeVar("Found")


@dataclass(frozen=True)
class Analysis:
    """What the compiler found in one graph."""

    module: fx.GraphModule
    plan: SelectivePlan
    regions: tuple[Region, ...]
    signature: Signature
    records: tuple[PassRecord, ...]
    dump_folder: Path | None = None


@dataclass(frozen=True)
class Traced:
    """A graph whose tokens were found, before anything is decided about them."""

    module: fx.GraphModule
    axes: AxisFacts
    runner: PassRunner
    dump_folder: Path | None


def trace(
    module: fx.GraphModule, inputs: Sequence[Any], options: Options, verify: bool = False
) -> Traced:
    """Normalize and find tokens. Raises Unsupported if there are none."""
    folder = next_dump_folder(options.dump_dir)
    runner = PassRunner(folder, verify)
    normalized = runner.run(
        NormalizePass(torch_adapter.export_functional), DynamoGraph(module, inputs)
    )
    return Traced(normalized, runner.run(AxesPass(), normalized), runner, folder)


def analyse(traced: Traced, states: Sequence[bool], options: Options) -> Analysis:
    """The remaining passes. Raises Unsupported with the reason if there is no plan.

    `states[i]` says whether input i is a parameter or buffer of the model.
    """
    runner = traced.runner
    plan = runner.run(SelectivePass(), traced.axes)
    regions = runner.run(RegionsPass(), plan)
    signature = build_signature(plan, states, options.timestep_arg)
    records = tuple(runner.records)
    return Analysis(traced.module, plan, regions, signature, records, traced.dump_folder)


def next_dump_folder(dump_dir: str | os.PathLike[str] | None) -> Path | None:
    """A folder of its own for each graph: graph_0, graph_1 ..."""
    if dump_dir is None:
        return None
    folders = (Path(dump_dir) / f"graph_{number}" for number in itertools.count())
    return next(folder for folder in folders if not folder.exists())


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
    return guarded(lambda: analyse(found, module_states(module, inputs), options))


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
    symbolic = torch_adapter.symbolic_inputs(inputs)
    reason = refusal(inputs)
    if symbolic and reason is None:
        specialised = partial(at_shape, module, states, known, settings)
        return PerShape(symbolic, floats_of(module), specialised)
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
    found = guarded(lambda: analyse(traced, states, options))
    alone: Callable[..., Any]
    if isinstance(found, Analysis):
        alone = selective_runtime(found, options, settings)
    else:
        alone = DenseOnly(dense, found, parameters)
    compiler = program_compiler(traced.dump_folder, options, settings)

    def planned(tokens: int) -> BlockPrograms:
        plan = guarded(lambda: plan_block(traced.axes, tokens, states))
        if isinstance(plan, str):
            raise Unsupported(plan)
        return BlockPrograms(traced.module, plan, sample_of(options), compiler)

    classes = traced.axes.classes
    lengths = [classes.size(segment) for segment in traced.axes.segments]
    return Block(alone, dense, module.forward, lengths, planned, parameters)


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
    compiler = program_compiler(analysis.dump_folder, options, settings)
    return LoweredPrograms(
        analysis.module, analysis.plan, analysis.signature, sample_of(options), compiler
    )


def program_compiler(
    folder: Path | None, options: Options, settings: Mapping[str, Any]
) -> ProgramCompiler:
    """Hands emitted programs to the inner compiler, and writes them to `folder` if there is one."""

    def compiler(name: str, program: fx.GraphModule, values: Sequence[Any]) -> Any:
        if folder is not None:
            code = program.print_readable(print_output=False)
            (folder / f"program_{name}.py").write_text(code)
        return torch_adapter.compile_program(program, values, options.inner_backend, settings)

    return compiler


def sample_of(options: Options) -> int:
    """Attention rows that measure importance."""
    return options.importance_queries or ALL_QUERIES


def backend(**options: Any) -> Callable[..., Any]:
    """A configured backend: `torch.compile(model, backend=specdiff.backend(cache_ratio=0.9))`.

    Unlike `options=`, this goes together with `mode=`. Raises OptionError at once.
    """
    Options.parse(options, torch_adapter.inductor_keys())
    return partial(specdiff_backend, options=options)
