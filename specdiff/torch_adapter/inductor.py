"""Inductor: its settings, and the hand-off of a graph to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.source import LocalSource
from torch._guards import CompileId, TracingContext, tracing
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import fresh_cache
from torch._logging._internal import trace_log, trace_structured
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from specdiff.errors import OptionError
from specdiff.quantized import (
    is_loaded,
    is_packed,
)
from specdiff.torch_adapter.placeholders import as_plain

InductorSettings = Mapping[str, Any]


def mode_settings(mode: str | None) -> dict[str, Any]:
    """Inductor settings of a `torch.compile` mode. Raises OptionError for an unknown mode."""
    known = torch._inductor.list_mode_options()
    if mode not in [None, *known]:
        raise OptionError(f"mode={mode!r}: must be one of {', '.join(map(repr, known))}")
    return {} if mode is None else dict(known[mode])


def inductor_settings(given: Mapping[str, Any], mode: str | None = None) -> dict[str, Any]:
    """What is given, on top of the settings of a mode, which it may name itself."""
    settings = {**mode_settings(given.get("mode", mode)), **given}
    settings.pop("mode", None)
    return settings


def inductor_keys() -> frozenset[str]:
    """Names of all Inductor settings."""
    return frozenset(torch._inductor.list_options())


def cold_caches() -> AbstractContextManager[Any]:
    """In here Inductor starts with an empty cache on disk, and leaves the usual one alone."""
    return fresh_cache()


def compile_program(
    module: fx.GraphModule, inputs: Sequence[Any], backend: str, settings: InductorSettings
) -> Callable[[Sequence[Any]], Sequence[Tensor]]:
    """Hand one emitted program to a compiler; the result takes its flat inputs as one sequence.

    Parameters and caches stay static inputs: CUDA graphs would copy them before each run
    otherwise. Outside a Dynamo compilation Inductor learns of them through a tracing context.
    """
    if any(is_packed(value) or is_loaded(value) for value in inputs):
        compiled_for_plain = compile_program(module, as_plain(inputs), backend, settings)
        return lambda values: compiled_for_plain(as_plain(values))
    if backend == "eager":
        return lambda values: module(*values)
    _restore_static_metadata(module)
    # Without a ShapeEnv Inductor caches nothing; of real inputs AOTAutograd would then make every
    # size symbolic, parameters' too, so it gets fakes whose sizes are numbers.
    mode = FakeTensorMode(shape_env=ShapeEnv())
    placeholders = module.graph.find_nodes(op="placeholder")
    fakes = [_static_fake(mode, *given) for given in zip(placeholders, inputs, strict=True)]
    with tracing(TracingContext(mode)), torch.no_grad():
        if backend == "aot_eager":
            compiled = aot_eager(module, fakes)
        else:
            compiled = _inductor(module, fakes, settings)
    # the GraphModule path of compile_fx takes its inputs one by one, whatever `_boxed_call` says
    return lambda values: compiled(*values)


def _static_fake(mode: FakeTensorMode, placeholder: fx.Node, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if placeholder.meta.get("static"):  # a cache; those of a scratch set share their memory
        with mode:
            return torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=value.device
            )
    return mode.from_tensor(value, static_shapes=True)


def compile_untouched(
    module: fx.GraphModule, inputs: Sequence[Any], backend: str, settings: InductorSettings
) -> Callable[..., Any]:
    """The Dynamo graph as it came, compiled inside the running Dynamo compilation."""
    if backend == "eager":
        return module.forward
    if backend == "aot_eager":
        return aot_eager(module, list(inputs))
    return _inductor(module, inputs, settings)


def _inductor(
    module: fx.GraphModule, inputs: Sequence[Any], settings: InductorSettings
) -> Callable[..., Any]:
    compiled = compile_fx(module, list(inputs), config_patches=dict(settings) or None)
    # serialised results come only of settings that specdiff never makes
    assert callable(compiled)
    return compiled


def _restore_static_metadata(module: fx.GraphModule) -> None:
    """What AOTAutograd looks for in a graph that came from Dynamo (frontend_utils.py)."""
    module.meta["dynamo_compile_id"] = CompileId(frame_id=0, frame_compile_id=0)
    constants = (name for name, _ in module.named_buffers(remove_duplicate=False))
    sources = {name: LocalSource(f"specdiff_{name}") for name in constants}
    module._param_name_to_source = sources  # type: ignore[assignment]
    for node in module.graph.find_nodes(op="placeholder"):
        origin = node.meta.pop("dynamo_placeholder", None)
        if origin is None and getattr(node, "_dynamo_source", None) is not None:
            continue  # a placeholder of Dynamo's own graph
        node._dynamo_source = getattr(origin, "_dynamo_source", None)
        described = dict(origin.meta.get("tensor_dict") or {}) if origin is not None else {}
        if node.meta.get("static"):
            described["_dynamo_static_input_type"] = "unguarded"
        node.meta["tensor_dict"] = described


def traces_artifacts() -> bool:
    """Whether torch writes a structured trace (`TORCH_TRACE`), for `trace_artifact`."""
    # before Dynamo's first record there is a handler that may turn out to write nothing
    return bool(trace_log.handlers)


def trace_artifact(name: str, text: str) -> None:
    """Add a text to torch's structured trace, where tlparse shows it by its name."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=lambda: text,
        expect_trace_id=False,
    )
