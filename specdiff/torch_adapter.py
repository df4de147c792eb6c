"""The one file that touches private torch API: tracing, sources of inputs, hand-off to Inductor.

Works on torch 2.11 to 2.15; what was tried is in the comments.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo import config as dynamo_config
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.source import LocalSource
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import aot_export_module
from torch._guards import CompileContext, CompileId, TracingContext, tracing
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import fresh_cache
from torch._logging._internal import trace_log, trace_structured
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from specdiff.errors import OptionError, Unsupported, described
from specdiff.quantized import (
    after_vmap,
    for_vmap,
    is_packed,
    keep_whole,
    quantized_weights,
    skip_conversions,
)

InductorSettings = Mapping[str, Any]

MODULE_CALLS = (torch.nn.Module._call_impl.__code__, torch.nn.Module._wrapped_call_impl.__code__)
"""Code through which every module is called."""
WRITES_TO_INPUTS = "the graph writes to one of its inputs"

SHARED_CALL = torch.ops.higher_order.invoke_subgraph
"""`(graph, its name, *operands)`: what `torch.compiler.nested_compile_region` makes of a function.

Tried on 2.11 and 2.13: AOTAutograd traces a graph of one name once, Inductor writes it as one
function, and writes to operands (`index_put_`, `copy_`) stay in place, with no copy of a cache.
"""


def export_functional(module: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """Functional pre-dispatch ATen of a Dynamo graph; placeholders are the graph's own inputs.

    Attributes of the Dynamo graph (constants it lifted) stay attributes. Raises Unsupported if
    the graph writes to an input, takes a tensor subclass, changes autocast or holds a vmap: an
    export that fails inside one of the latter two leaves it entered, for whatever runs next.
    """
    quantized = quantized_weights(module, inputs)
    packed = tuple(i for i, value in enumerate(inputs) if is_packed(value))
    if packed:
        module = copy_graph(module)
        skip_conversions(module.graph)
        module.recompile()
    inputs = _with_stand_ins(inputs, (*quantized, *packed))
    require_plain_tensors(inputs)
    require_one_autocast(module.graph)
    if any("vmap_increment_nesting" in str(node.target) for node in module.graph.nodes):
        raise Unsupported("the graph holds a torch.func.vmap, as masks of flex attention do")
    with fx.traceback.preserve_node_meta():
        exported, signature = aot_export_module(
            module, list(inputs), trace_joint=False, pre_dispatch=True
        )
    assert isinstance(exported, fx.GraphModule)
    if signature.buffers_to_mutate or getattr(signature, "user_inputs_to_mutate", None):
        raise Unsupported(WRITES_TO_INPUTS)
    _restore_attributes(module, exported, signature)
    _restore_placeholders(module, exported, inputs)
    _remove_autocast(exported.graph)
    placeholders = exported.graph.find_nodes(op="placeholder")
    keep_whole(exported.graph, [placeholders[i] for i in quantized])
    return exported


def _with_stand_ins(inputs: Sequence[Any], positions: Sequence[int]) -> list[Any]:
    """Inputs with plain fakes in the place of those that are tensor subclasses."""
    found = list(inputs)
    for position in positions:
        value, mode = inputs[position], TracingContext.get().fake_mode
        assert mode is not None
        with mode:  # fakes of another mode get symbolic sizes
            found[position] = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    return found


def as_bytes(values: Sequence[Any]) -> list[Any]:
    """Inputs of a graph, those of GGUF as plain tensors."""
    with torch._C.DisableTorchFunctionSubclass():
        return [v.as_subclass(Tensor) if is_packed(v) else v for v in values]


def vectorized(module: fx.GraphModule, inputs: Sequence[Tensor], index: int) -> fx.GraphModule:
    """A graph of fakes over a further leading axis of input `index`, which it already has there.

    Its outputs have that axis, too. Raises Unsupported if vmap cannot take an op.
    """
    over = tuple(0 if i == index else None for i in range(len(inputs)))
    try:
        with (
            fake_mode_of(inputs[index]),
            torch.no_grad(),
        ):  # in which the graph makes tensors of its own, too
            made = make_fx(torch.func.vmap(for_vmap(module), in_dims=over))(*inputs)
            return after_vmap(made)
    except Exception as error:
        if is_restart(error):
            raise
        raise Unsupported(described(error)) from error


def require_plain_tensors(inputs: Sequence[Any]) -> None:
    """Raise Unsupported if an input is no plain tensor, such as a quantized weight.

    The export takes no wrappers of tensors, and a graph of what they wrap would have other inputs
    than Dynamo's; what answers ops itself (GGUF in diffusers) makes constants of fakes.
    """
    for value in inputs:
        answers = isinstance(value, Tensor) and _torch_function(type(value)) not in _PLAIN
        if answers or is_traceable_wrapper_subclass(value):
            name = type(value).__name__
            raise Unsupported(f"a weight or input is no plain tensor but a subclass, {name}")


def _torch_function(kind: type) -> Any:
    """How tensors of this type answer functions of torch."""
    function = kind.__torch_function__  # type: ignore[attr-defined]
    return getattr(function, "__func__", function)  # bound to each subclass that inherits it


_PLAIN = (_torch_function(Tensor), _torch_function(torch.nn.Parameter))


def require_one_autocast(graph: fx.Graph) -> None:
    """Raise Unsupported if a region of a Dynamo graph runs under another autocast than the rest.

    Pre-dispatch ops are recorded before autocast casts their operands, and the emitted programs
    keep no regions: every op is computed under the autocast of the call, on which Dynamo guards.
    """
    for node in graph.find_nodes(op="call_function", target=_enter_autocast):
        device, dtype, enabled, _ = node.args
        outside = torch.is_autocast_enabled(device)
        same_dtype = not enabled or dtype in (None, torch.get_autocast_dtype(device))
        if enabled != outside or not same_dtype:
            what = f"torch.autocast({device!r}, {dtype}, enabled={enabled})"
            raise Unsupported(f"a part of the model runs under {what}, unlike the rest of it")


def _remove_autocast(graph: fx.Graph) -> None:
    """Drop regions that change nothing; each exit names its entry, so exits go first."""
    for target in (_exit_autocast, _enter_autocast):
        for node in graph.find_nodes(op="call_function", target=target):
            graph.erase_node(node)


def _restore_attributes(source: fx.GraphModule, exported: fx.GraphModule, signature: Any) -> None:
    lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for node in exported.graph.find_nodes(op="placeholder"):
        name = lifted.get(node.name)
        if name is None:
            continue
        attribute = name.replace(".", "_")
        owner, _, leaf = name.rpartition(".")
        exported.register_buffer(attribute, getattr(source.get_submodule(owner), leaf))
        with exported.graph.inserting_before(node):
            constant = exported.graph.get_attr(attribute)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
        exported.graph.erase_node(node)


def _restore_placeholders(
    source: fx.GraphModule, exported: fx.GraphModule, inputs: Sequence[Any]
) -> None:
    old = source.graph.find_nodes(op="placeholder")
    new = exported.graph.find_nodes(op="placeholder")
    for before, after, value in zip(old, new, inputs, strict=True):
        after.meta.setdefault("val", value)  # tracing gives none to a plain number
        after.meta["source"] = source_name(before)
        after.meta["dynamo_placeholder"] = before


def source_name(placeholder: fx.Node) -> str:
    """Where Dynamo took this input from, e.g. `L['kwargs']['timestep']`."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return placeholder.name
    name = source.name
    # a method in torch 2.11, a property since
    return str(name() if callable(name) else name)


def sources(module: fx.GraphModule) -> list[str]:
    """Where Dynamo took each flat input of its graph from."""
    return [source_name(node) for node in module.graph.find_nodes(op="placeholder")]


def example_outputs(module: fx.GraphModule) -> list[Any]:
    """A fake of each flat output of a Dynamo graph; None of what is no tensor."""
    (output,) = module.graph.find_nodes(op="output")
    values = pytree.tree_leaves(output.args[0])
    metas = [value.meta if isinstance(value, fx.Node) else {} for value in values]
    return [meta.get("example_value", meta.get("val")) for meta in metas]


def is_module_state(placeholder: fx.Node, value: Any) -> bool:
    """Whether an input is a parameter or buffer of the compiled module."""
    if isinstance(value, torch.nn.Parameter):
        return True
    name = source_name(placeholder)
    return "_parameters'" in name or "_buffers'" in name


def symbolic_inputs(inputs: Sequence[Any]) -> tuple[int, ...]:
    """Positions of inputs that are symbolic sizes, or have some."""
    return tuple(i for i, value in enumerate(inputs) if _is_symbolic(value))


def symbolic_shapes(module: fx.GraphModule, inputs: Sequence[Any]) -> tuple[int, ...]:
    """Positions of those that a program must be made for: tensors, and sizes that a node reads.

    Dynamo also makes an input of where a view begins in its storage. A pipeline that hands over
    `timesteps[i].expand(batch)` has another one at each step.
    """
    nodes = module.graph.find_nodes(op="placeholder")
    return tuple(
        i for i in symbolic_inputs(inputs) if isinstance(inputs[i], Tensor) or nodes[i].users
    )


def _is_symbolic(value: Any) -> bool:
    parts = (*value.shape, *value.stride()) if isinstance(value, Tensor) else (value,)
    return any(isinstance(part, torch.SymInt) for part in parts)


def static_fakes(inputs: Sequence[Any]) -> list[Any]:
    """Fakes of real inputs, their shapes static; what is no tensor stays as it is.

    Raises Unsupported for a tensor subclass, whose fake would be a plain tensor.
    """
    require_plain_tensors(inputs)
    mode = FakeTensorMode()

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        with mode:
            return torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=value.device
            )

    return [fake(value) for value in inputs]


def copy_graph(module: fx.GraphModule) -> fx.GraphModule:
    """A Dynamo graph with nodes of its own; placeholders keep their sources."""
    copied = fx.GraphModule(module, copy.deepcopy(module.graph))
    copied.__dict__["compile_subgraph_reason"] = getattr(module, "compile_subgraph_reason", None)
    old = module.graph.find_nodes(op="placeholder")
    for before, after in zip(old, copied.graph.find_nodes(op="placeholder"), strict=True):
        after._dynamo_source = getattr(before, "_dynamo_source", None)
        after.meta = dict(before.meta)
    return copied


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


def is_restart(error: BaseException) -> bool:
    """Whether an exception is Dynamo's own control flow, which must reach Dynamo."""
    return isinstance(error, TorchDynamoException)


def compile_program(
    module: fx.GraphModule, inputs: Sequence[Any], backend: str, settings: InductorSettings
) -> Callable[[Sequence[Any]], Sequence[Tensor]]:
    """Hand one emitted program to a compiler; the result takes its flat inputs as one sequence.

    Parameters and caches stay static inputs: CUDA graphs would copy them before each run
    otherwise. Outside a Dynamo compilation Inductor learns of them through a tracing context.
    """
    if any(map(is_packed, inputs)):
        compiled_for_bytes = compile_program(module, as_bytes(inputs), backend, settings)
        return lambda values: compiled_for_bytes(as_bytes(values))
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


def _forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return self._call_impl(*args, **kwargs)  # whatever it is compiled with in place


def trace_once(
    model: torch.nn.Module,
    backend: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> None:
    """Run `model` once, its graphs given to `backend`, whatever was compiled of it before.

    Dynamo keeps variants, their limit and the sizes it has seen by code object: this takes a new
    one, so that the model's own are left alone.
    """
    forward = FunctionType(_forward.__code__.replace(), globals())
    torch.compile(forward, backend=backend, dynamic=False)(model, *args, **kwargs)


def graphs_compiled() -> int:
    """How many graphs Dynamo has handed to a backend since `forget_compiled`."""
    return int(counters["stats"]["unique_graphs"])


def is_cut(module: fx.GraphModule) -> bool:
    """Whether a break ends a Dynamo graph, rather than the return of a function."""
    return bool(getattr(getattr(module, "compile_subgraph_reason", None), "graph_break", False))


def latest_break() -> str:
    """Where and why Dynamo broke a graph for the first time of this kind, the latest one.

    One line; empty if it never did.
    """
    text = next(reversed(counters["graph_break"]), "")
    context = re.search(r"debug context: (.+)", text)
    parts = [text.partition("\n")[0], context[1] if context else ""]
    return ": ".join(re.sub(r" at 0x\w+", "", part) for part in parts if part)


def is_last_variant() -> bool:
    """Whether Dynamo will compile no other variant of the function that it is compiling now."""
    current = CompileContext.current_compile_id()
    number = None if current is None else current.frame_compile_id
    return number is not None and number + 1 >= dynamo_config.recompile_limit


def forget_compiled() -> None:
    """Drop every compiled graph, and set Dynamo's counters back to zero."""
    torch.compiler.reset()
    counters.clear()


def mutates(target: Any) -> bool:
    """Whether an op writes to an operand."""
    return isinstance(target, OpOverload) and target._schema.is_mutable


def default_backend() -> str | Callable[..., Any] | None:
    """What `torch.compile` uses where it is given no backend; None: this torch cannot change it.

    torch 2.13 was the first that can. A debug switch, the environment variable
    TORCH_COMPILE_OVERRIDE_BACKENDS=">=0:specdiff", counts, too.
    """
    if "specdiff" in getattr(dynamo_config, "debug_backend_override", ""):
        return "specdiff"
    found = getattr(torch.compiler, "get_default_backend", None)
    return None if found is None else found()


def set_default_backend(backend: Callable[..., Any]) -> None:
    """Make `torch.compile` use `backend` where it is given none; only where `default_backend`."""
    torch.compiler.set_default_backend(backend)


def op_name(target: object) -> str | None:
    """The name of an op, "namespace::name"; None of what is none. Takes a `custom_op`, too."""
    target = getattr(target, "_opoverload", target)
    if isinstance(target, OpOverload):
        return str(target._schema.name)
    return str(target._qualified_op_name) if isinstance(target, OpOverloadPacket) else None


@dataclass(frozen=True)
class OpArgument:
    """One argument of an op."""

    name: str
    is_tensor: bool
    """Whether it is one tensor, and never None."""
    default: Any


def op_arguments(target: Any) -> list[OpArgument]:
    """The arguments of an op in the order of its schema."""
    return [
        OpArgument(a.name, str(a.type) == "Tensor", a.default_value)
        for a in target._schema.arguments
    ]


def storage_of(value: Tensor) -> int:
    """What tensors that share memory have in common, fake ones too."""
    return int(StorageWeakRef(value.untyped_storage()).cdata)


def fake_mode_of(value: Tensor) -> FakeTensorMode:
    """The mode that a fake tensor was made in."""
    assert isinstance(value, FakeTensor)
    return value.fake_mode
