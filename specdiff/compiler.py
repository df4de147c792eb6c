"""The entry point: `torch.compile(model, backend="specdiff")` calls it for each graph.

    Dynamo graph -> pipeline (Analysis) -> lower (programs) -> Runtime, which answers calls

A graph without a token-selective form runs unchanged through the same inner compiler; the reason
is logged and kept for `stats`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import fx, nn

from specdiff import torch_adapter
from specdiff.caller import model_of_part
from specdiff.errors import Unsupported
from specdiff.inspect.publish import publish
from specdiff.options import Options
from specdiff.passes.base import PassRecord
from specdiff.passes.emit.lower import TIMETABLE, BlockPrograms, LoweredPrograms, ProgramCompiler
from specdiff.passes.graph.dump import Dump
from specdiff.passes.normalize.specialise import floats_of, specialise
from specdiff.passes.select.block import (
    lengths_held,
    lengths_of,
    returned_lengths,
    select_block,
    work_of,
)
from specdiff.passes.select.input_roles import short_name
from specdiff.passes.select.quantize import quantized
from specdiff.passes.share.outline import share_repeats
from specdiff.pipeline import (
    GRADIENTS,
    Analysis,
    Traced,
    analyse_or_reason,
    module_states,
    observers,
    or_reason,
    refusal,
    trace,
    whole_steps,
)
from specdiff.program import time_rank
from specdiff.quantized import is_quantized
from specdiff.runtime.blocks.block import Block, OneGraph, Prunable, is_attached
from specdiff.runtime.records.stats import LAST_VARIANT
from specdiff.runtime.step.dense_only import DenseOnly
from specdiff.runtime.step.dispatch import Runtime
from specdiff.runtime.step.part import Part
from specdiff.runtime.step.shapes import PerShape
from specdiff.runtime.step.step_programs import StepPrograms
from specdiff.runtime.streams.registry import find_or_create, state_of
from specdiff.settings import IMPORTANCE_QUERIES

log = logging.getLogger(__name__)

ALL_QUERIES = 1 << 62
MUST_RUN = (GRADIENTS, torch_adapter.WRITES_TO_INPUTS)
"""Why no call of a denoiser may be left out."""
AsPart = Callable[[Callable[..., Any]], Part]
"""Makes of a compiled graph what answers it as a part of its model."""
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
    known, given = Options.parse(dict(options or {}), torch_adapter.inductor_keys())
    inductor_settings = torch_adapter.inductor_settings(given, mode)
    is_state = module_states(module, inputs)
    part = part_of_model(module, inputs, is_state, known)
    if part is None and is_for_all() and not is_attached() and not has_time(module, known):
        log.debug("compiled as it is: no time input was found")
        return torch_adapter.compile_untouched(
            module, inputs, known.inner_backend, inductor_settings
        )
    if part is None:
        note_variant(inputs)
    symbolic, floats = torch_adapter.symbolic_inputs(module, inputs), floats_of(module)
    reason = refusal(inputs)
    if (symbolic or floats) and reason is None:
        specialised = partial(at_shape, module, is_state, known, inductor_settings, part)
        changing = DenseOnly(module.forward, CHANGING, parameters_among(is_state))
        shapes = torch_adapter.symbolic_shapes(module, inputs)
        return PerShape(shapes, floats, specialised, changing)
    traced: Traced | str
    traced = or_reason(lambda: trace(module, inputs, known)) if reason is None else reason
    if isinstance(traced, Traced):
        return compile_with_tokens(module, traced, is_state, known, inductor_settings, part)
    compiled = torch_adapter.compile_untouched(
        module, inputs, known.inner_backend, inductor_settings
    )
    return compile_whole_steps(module, compiled, inputs, is_state, known, traced, part)


def is_for_all() -> bool:
    """Whether this backend compiles whatever the process compiles, chosen for it or not."""
    default = torch_adapter.default_backend()
    return default == "specdiff" or getattr(default, "func", default) is specdiff_backend


def has_time(module: fx.GraphModule, options: Options) -> bool:
    """Whether an input of a graph has the name of a time."""
    names = map(short_name, torch_adapter.sources(module))
    return any(time_rank(name, options.timestep_arg) is not None for name in names)


def part_of_model(
    module: fx.GraphModule, inputs: Sequence[Any], is_state: Sequence[bool], options: Options
) -> AsPart | None:
    """For a graph of a model that breaks into several; None where it is a whole one.

    Tells the registry whose parameters these are: all graphs of a model are counted together.
    """
    parameters = [value for value in inputs if isinstance(value, nn.Parameter)]
    is_cut = torch_adapter.is_cut(module)
    model = model_of_part(
        parameters, lambda name: time_rank(name, options.timestep_arg) is not None, is_cut=is_cut
    )
    if model is None:
        return None
    name = type(model).__name__
    cause = torch_adapter.latest_break()
    remedy = f"specdiff.attach(model), with the {name} as model, forecasts its whole steps"
    if cause:
        remedy += f" (torch.compile broke it because: {cause})"
    return partial(
        Part, state=find_or_create(model), parameters=parameters_among(is_state), remedy=remedy
    )


def note_variant(inputs: Sequence[Any]) -> None:
    """Say, and keep for `stats`, that this is the last variant that Dynamo compiles of a model."""
    state = state_of(value for value in inputs if isinstance(value, nn.Parameter))
    if state is None or is_attached():
        return
    state.last_variant = torch_adapter.is_last_variant()
    if state.last_variant:
        state.say(log, LAST_VARIANT)


def at_shape(
    module: fx.GraphModule,
    is_state: Sequence[bool],
    options: Options,
    inductor_settings: Mapping[str, Any],
    part: AsPart | None,
    inputs: Sequence[Any],
) -> Callable[..., Any]:
    """Compile a graph with symbolic sizes for the sizes that `inputs` have."""
    static = specialise(module, inputs, torch_adapter.copy_graph)
    traced = or_reason(lambda: trace(static, torch_adapter.static_fakes(inputs), options))
    if isinstance(traced, Traced):
        return compile_with_tokens(static, traced, is_state, options, inductor_settings, part)
    dense = compiled_at_first_call(static, options, inductor_settings)
    return compile_whole_steps(static, dense, inputs, is_state, options, traced, part)


def compile_whole_steps(
    module: fx.GraphModule,
    dense: Callable[..., Any],
    inputs: Sequence[Any],
    is_state: Sequence[bool],
    options: Options,
    reason: str,
    part: AsPart | None,
) -> Callable[..., Any]:
    """Prepare a graph whose tokens cannot be selected: its steps are computed or forecast whole.

    Args:
        module: the graph as it came.
        dense: the same, compiled.
        inputs: an example of them.
        is_state: which of them are parameters or buffers.
        options: of the backend.
        reason: why no tokens can be selected; also why it runs dense, where it has no boundary.
        part: answers it where it is a part of a model, and its steps are not that model's.
    """
    if part is not None:
        return OneGraph(part(dense), dense)
    try:
        signature = whole_steps(module, inputs, is_state, options.timestep_arg, reason)
    except Unsupported as error:
        if is_for_all() and str(error) not in MUST_RUN:
            log.debug("compiled as it is: %s", error)
            return OneGraph(dense, dense)
        refused = DenseOnly(dense, reason, parameters_among(is_state), str(error))
        return OneGraph(refused, dense)
    programs = StepPrograms(lambda values: dense(*values), signature)
    return OneGraph(Runtime(programs, options, dense), dense)


def compile_with_tokens(
    module: fx.GraphModule,
    traced: Traced,
    is_state: Sequence[bool],
    options: Options,
    inductor_settings: Mapping[str, Any],
    part: AsPart | None,
) -> Block:
    """Prepare a graph with tokens, for use alone or as a block of an attached root.

    Each program is compiled when it is first run.
    """
    parameters = parameters_among(is_state)
    dense = compiled_at_first_call(module, options, inductor_settings)
    outcome = analyse_or_reason(traced, is_state, options)
    publish(outcome, traced.dump, options)
    alone: Callable[..., Any]
    is_cut = torch_adapter.is_cut(module)
    if part is not None and (is_cut or isinstance(outcome, str) or outcome.signature.time is None):
        alone = OneGraph(part(dense), dense)
    elif isinstance(outcome, Analysis):
        alone = Runtime(lowered_programs(outcome, options, inductor_settings), options, dense)
    else:
        examples = [node.meta["val"] for node in traced.module.graph.find_nodes(op="placeholder")]
        alone = compile_whole_steps(module, dense, examples, is_state, options, outcome, part)
    compiler = program_compiler(traced.dump, options, inductor_settings)

    names = [short_name(source) for source in torch_adapter.sources(module)]

    def block_programs(prunable: Prunable) -> BlockPrograms:
        holder = None if prunable.holder is None else names.index(prunable.holder)
        selection = or_reason(
            lambda: quantized(
                select_block(traced.axes, prunable.tokens, is_state, holder), options.kv_cache_code
            )
        )
        if isinstance(selection, str):
            raise Unsupported(selection)
        return BlockPrograms(traced.module, selection, sample_of(options), compiler)

    work = work_of(traced.module.graph)
    axes = traced.axes
    lengths = (lengths_of(axes), returned_lengths(axes), lengths_held(axes, names))
    return Block(alone, dense, module.forward, *lengths, block_programs, parameters, work)


def compiled_at_first_call(
    module: fx.GraphModule, options: Options, inductor_settings: Mapping[str, Any]
) -> Callable[..., Any]:
    """The unchanged Dynamo graph, compiled at its first call."""
    compiled: list[Callable[[Sequence[Any]], Any]] = []

    def run(*values: Any) -> Any:
        if not compiled:
            inner = options.inner_backend
            compiled.append(torch_adapter.compile_program(module, values, inner, inductor_settings))
        return compiled[0](values)

    return run


def parameters_among(is_state: Sequence[bool]) -> tuple[int, ...]:
    """Positions of parameters and buffers among the inputs."""
    return tuple(i for i, state in enumerate(is_state) if state)


def lowered_programs(
    analysis: Analysis, options: Options, inductor_settings: Mapping[str, Any]
) -> LoweredPrograms:
    """The programs of an analysed graph; each is compiled when it is first run."""
    compiler = program_compiler(analysis.dump, options, inductor_settings)
    return LoweredPrograms(
        analysis.module, analysis.selection, analysis.signature, sample_of(options), compiler
    )


def program_compiler(
    dump: Dump | None, options: Options, inductor_settings: Mapping[str, Any]
) -> ProgramCompiler:
    """A compiler of emitted programs: it informs the observers, then calls the inner backend."""

    def compiler(name: str, program: fx.GraphModule, values: Sequence[Any]) -> Any:
        record: PassRecord = program.meta["record"]
        log.debug("%s", record)
        for observer in observers(dump):
            observer(record, program, {})

        # a table is filled once or twice a generation: compiling would not pay
        inner = "eager" if name.startswith(TIMETABLE) else options.inner_backend

        def compiled(program: fx.GraphModule) -> Any:
            return torch_adapter.compile_program(program, values, inner, inductor_settings)

        shares = inner == "inductor" and not any(map(is_quantized, values))
        shared = compile_shared(name, program, compiled) if shares else None
        return shared or compiled(program)

    return compiler


def compile_shared(
    name: str, program: fx.GraphModule, compiled: Callable[[fx.GraphModule], Any]
) -> Any:
    """Compile the program with its repeated blocks compiled once.

    Returns None if no block repeats, or if Inductor refuses calls of graphs, as it does under
    `cpp_wrapper` and some other options.
    """
    try:
        shared, graphs = share_repeats(program, torch_adapter.SHARED_CALL)
        for each in graphs:
            log.debug("program %s: %s", name, each)
        return compiled(shared) if graphs else None
    except Exception as error:
        if torch_adapter.is_restart(error):
            raise
        log.info("program %s: blocks are not shared, because of %r", name, error)
        return None


def sample_of(options: Options) -> int:
    """Number of attention rows that importance is measured from; an ablation may change it."""
    ablation = options.ablation or {}
    return ablation.get("importance_queries", IMPORTANCE_QUERIES) or ALL_QUERIES


def backend(**options: Any) -> Callable[..., Any]:
    """A configured backend: `torch.compile(model, backend=specdiff.backend(cache_ratio=0.9))`.

    Unlike `options=`, this goes together with `mode=`. Raises OptionError at once.
    """
    Options.parse(options, torch_adapter.inductor_keys())
    return partial(specdiff_backend, options=options)
