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
from typing import Any

import torch
from torch import fx

from specdiff import torch_adapter
from specdiff.options import Options
from specdiff.passes.axes import AxesPass
from specdiff.passes.base import PassRecord, PassRunner, Unsupported
from specdiff.passes.lower import LoweredPrograms
from specdiff.passes.normalize import DynamoGraph, NormalizePass
from specdiff.passes.regions import Region, RegionsPass
from specdiff.passes.selective import SelectivePass, SelectivePlan
from specdiff.passes.signature import build_signature
from specdiff.passes.specialise import floats_of, specialise
from specdiff.program import Signature
from specdiff.runtime.dispatch import DenseOnly, Runtime
from specdiff.runtime.shapes import PerShape

log = logging.getLogger(__name__)

ALL_QUERIES = 1 << 62


@dataclass(frozen=True)
class Analysis:
    """What the compiler found in one graph."""

    module: fx.GraphModule
    plan: SelectivePlan
    regions: tuple[Region, ...]
    signature: Signature
    records: tuple[PassRecord, ...]
    dump_folder: Path | None = None


def analyse(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    states: Sequence[bool],
    options: Options,
    verify: bool = False,
) -> Analysis:
    """Run every pass up to the plan. Raises Unsupported with the reason if there is none.

    `states[i]` says whether input i is a parameter or buffer of the model.
    """
    folder = next_dump_folder(options.dump_dir)
    runner = PassRunner(folder, verify)
    normalized = runner.run(
        NormalizePass(torch_adapter.export_functional), DynamoGraph(module, inputs)
    )
    axes = runner.run(AxesPass(), normalized)
    plan = runner.run(SelectivePass(), axes)
    regions = runner.run(RegionsPass(), plan)
    signature = build_signature(plan, states, options.timestep_arg)
    return Analysis(normalized, plan, regions, signature, tuple(runner.records), folder)


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
    try:
        return analyse(module, inputs, module_states(module, inputs), options, verify)
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
    if symbolic and refusal(inputs) is None:
        specialised = partial(at_shape, module, states, known, settings)
        return PerShape(symbolic, floats_of(module), specialised)
    found = attempt(module, inputs, known)
    if isinstance(found, Analysis):
        return selective_runtime(found, known, settings)
    compiled = torch_adapter.compile_untouched(module, inputs, known.inner_backend, settings)
    return DenseOnly(compiled, found, parameters_among(states))


def at_shape(
    module: fx.GraphModule,
    states: Sequence[bool],
    options: Options,
    settings: Mapping[str, Any],
    inputs: Sequence[Any],
) -> Callable[..., Any]:
    """What answers a graph with symbolic sizes where its inputs have those of `inputs`."""
    static = specialise(module, inputs, torch_adapter.copy_graph)
    try:
        found = analyse(static, torch_adapter.static_fakes(inputs), states, options)
        return selective_runtime(found, options, settings)
    except Unsupported as error:
        compiled = torch_adapter.compile_program(static, inputs, options.inner_backend, settings)
        return DenseOnly(lambda *values: compiled(values), str(error), parameters_among(states))


def parameters_among(states: Sequence[bool]) -> tuple[int, ...]:
    """Positions of parameters and buffers among the inputs."""
    return tuple(i for i, state in enumerate(states) if state)


def selective_runtime(analysis: Analysis, options: Options, settings: Mapping[str, Any]) -> Runtime:
    """The runtime of an analysed graph; its programs are compiled when they are first run."""

    def compiler(name: str, program: fx.GraphModule, values: Sequence[Any]) -> Any:
        if analysis.dump_folder is not None:
            code = program.print_readable(print_output=False)
            (analysis.dump_folder / f"program_{name}.py").write_text(code)
        return torch_adapter.compile_program(program, values, options.inner_backend, settings)

    sample = options.importance_queries or ALL_QUERIES
    programs = LoweredPrograms(analysis.module, analysis.plan, analysis.signature, sample, compiler)
    return Runtime(programs, options)


def backend(**options: Any) -> Callable[..., Any]:
    """A configured backend: `torch.compile(model, backend=specdiff.backend(cache_ratio=0.9))`.

    Unlike `options=`, this goes together with `mode=`. Raises OptionError at once.
    """
    Options.parse(options, torch_adapter.inductor_keys())
    return partial(specdiff_backend, options=options)
