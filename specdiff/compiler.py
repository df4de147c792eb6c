"""The entry point: what `torch.compile(model, backend="specdiff")` calls for each graph.

pipeline -> lower -> runtime. A graph that has no token-selective form runs as it came, through the
same inner compiler, and the reason is kept and logged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import fx

from specdiff import torch_adapter
from specdiff.boundary import Leaf, step_signature
from specdiff.errors import Unsupported
from specdiff.inspect.publish import publish
from specdiff.options import Options
from specdiff.passes.base import PassRecord
from specdiff.passes.emit.lower import TIMETABLE, BlockPrograms, LoweredPrograms
from specdiff.passes.emit.lower import Compiler as ProgramCompiler
from specdiff.passes.graph.dump import Dump
from specdiff.passes.graph.in_place import writes_to_inputs
from specdiff.passes.normalize.specialise import floats_of, specialise
from specdiff.passes.plan.block import plan_block, work_of
from specdiff.passes.plan.input_roles import is_item, short_name
from specdiff.passes.plan.quantize import quantized
from specdiff.passes.share.outline import share_repeats
from specdiff.pipeline import (
    GRADIENTS,
    Analysis,
    Traced,
    concluded,
    guarded,
    module_states,
    observers,
    refusal,
    trace,
)
from specdiff.runtime.blocks.block import Block, OneGraph
from specdiff.runtime.step.dispatch import DenseOnly, Runtime
from specdiff.runtime.step.shapes import PerShape
from specdiff.runtime.step.step_programs import StepPrograms
from specdiff.settings import IMPORTANCE_QUERIES

log = logging.getLogger(__name__)

ALL_QUERIES = 1 << 62
MUST_RUN = (GRADIENTS, torch_adapter.WRITES_TO_INPUTS)
"""Why no call of a graph may be left out."""
CHANGING = "numbers in the graph, such as an adapter's strength, change too often to compile for"


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
    settings = torch_adapter.inductor_settings(settings, mode)
    states = module_states(module, inputs)
    symbolic, floats = torch_adapter.symbolic_inputs(inputs), floats_of(module)
    reason = refusal(inputs)
    if (symbolic or floats) and reason is None:
        specialised = partial(at_shape, module, states, known, settings)
        changing = DenseOnly(module.forward, CHANGING, parameters_among(states))
        shapes = torch_adapter.symbolic_shapes(module, inputs)
        return PerShape(shapes, floats, specialised, changing)
    traced: Traced | str
    traced = guarded(lambda: trace(module, inputs, known)) if reason is None else reason
    if isinstance(traced, Traced):
        return answer(module, traced, states, known, settings)
    compiled = torch_adapter.compile_untouched(module, inputs, known.inner_backend, settings)
    return whole_steps(module, compiled, inputs, states, known, traced)


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
    dense = when_needed(static, options, settings)
    return whole_steps(static, dense, inputs, states, options, traced)


def whole_steps(
    module: fx.GraphModule,
    dense: Callable[..., Any],
    inputs: Sequence[Any],
    states: Sequence[bool],
    options: Options,
    reason: str,
) -> Callable[..., Any]:
    """What answers a graph whose tokens cannot be selected: steps computed or forecast whole.

    Args:
        module: the graph as it came.
        dense: the same, compiled.
        inputs: an example of them.
        states: which of them are parameters or buffers.
        options: of the backend.
        reason: why no tokens can be selected; also why it runs dense, where it has no boundary.
    """
    parameters = parameters_among(states)
    refused = OneGraph(DenseOnly(dense, reason, parameters), dense)
    if reason in MUST_RUN or writes_to_inputs(module.graph):
        return refused
    try:
        leaves = [
            Leaf(short_name(source), value, is_state, is_item(source))
            for source, value, is_state in zip(
                torch_adapter.sources(module), inputs, states, strict=True
            )
        ]
        outputs = torch_adapter.example_outputs(module)
        signature = step_signature(leaves, outputs, options.timestep_arg, reason)
    except Unsupported:
        return refused
    programs = StepPrograms(lambda values: dense(*values), signature)
    return OneGraph(Runtime(programs, options, dense), dense)


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
    publish(found, traced.dump, options)
    alone: Callable[..., Any]
    if isinstance(found, Analysis):
        alone = Runtime(programs_of(found, options, settings), options, dense)
    else:
        examples = [node.meta["val"] for node in traced.module.graph.find_nodes(op="placeholder")]
        alone = whole_steps(module, dense, examples, states, options, found)
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

        # once or twice a generation, but for the first: not worth the time that compiling takes
        inner = "eager" if name.startswith(TIMETABLE) else options.inner_backend

        def compiled(program: fx.GraphModule) -> Any:
            return torch_adapter.compile_program(program, values, inner, settings)

        shares = inner == "inductor"
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
    """Attention rows that measure importance; an experiment may have others, None for all."""
    ablation = options.ablation or {}
    return ablation.get("importance_queries", IMPORTANCE_QUERIES) or ALL_QUERIES


def backend(**options: Any) -> Callable[..., Any]:
    """A configured backend: `torch.compile(model, backend=specdiff.backend(cache_ratio=0.9))`.

    Unlike `options=`, this goes together with `mode=`. Raises OptionError at once.
    """
    Options.parse(options, torch_adapter.inductor_keys())
    return partial(specdiff_backend, options=options)
