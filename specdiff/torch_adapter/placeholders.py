"""Placeholders: what Dynamo knows of the inputs of a graph."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from specdiff.errors import Unsupported
from specdiff.quantized import (
    is_loaded,
    is_packed,
)


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


def example_outputs(module: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """A fake of each flat output of a Dynamo graph for such inputs; None of what is no tensor."""
    (output,) = module.graph.find_nodes(op="output")
    values = pytree.tree_leaves(output.args[0])
    metas = [value.meta if isinstance(value, fx.Node) else {} for value in values]
    noted = [meta.get("example_value", meta.get("val")) for meta in metas]
    if not any(map(_is_symbolic, noted)):
        return noted
    sizes = _sizes(module, inputs)  # what was noted holds for other sizes
    with FakeTensorMode():
        return [_of_sizes(value, sizes) if _is_symbolic(value) else value for value in noted]


def _sizes(module: fx.GraphModule, inputs: Sequence[Any]) -> dict[Any, int]:
    """What the symbols among the sizes of placeholders are for these inputs."""
    sizes: dict[Any, int] = {}
    pairs: list[tuple[Any, Any]]
    for node, value in zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True):
        example = node.meta.get("example_value")
        if isinstance(example, Tensor) and isinstance(value, Tensor):
            pairs = list(zip(example.shape, value.shape, strict=True))
        else:
            pairs = [(example, value)]
        sizes |= {
            symbol.node.expr: int(size)
            for symbol, size in pairs
            if isinstance(symbol, torch.SymInt)
        }
    return sizes


def _of_sizes(value: Any, sizes: dict[Any, int]) -> Tensor | None:
    if not isinstance(value, Tensor):
        return None
    symbols: list[Any] = list(value.shape)
    shape = [
        int(size.node.expr.subs(sizes)) if isinstance(size, torch.SymInt) else size
        for size in symbols
    ]
    return torch.empty(shape, dtype=value.dtype, device=value.device)


def is_module_state(placeholder: fx.Node, value: Any) -> bool:
    """Whether an input is a parameter or buffer of the compiled module."""
    if isinstance(value, torch.nn.Parameter):
        return True
    name = source_name(placeholder)
    return "_parameters'" in name or "_buffers'" in name


def symbolic_inputs(module: fx.GraphModule, inputs: Sequence[Any]) -> tuple[int, ...]:
    """Positions of inputs that are symbolic sizes, or have some.

    What Dynamo knows of a tensor is asked, where it has noted it: it may hand over a real one.
    """
    nodes = module.graph.find_nodes(op="placeholder")
    examples = [
        node.meta.get("example_value", value) for node, value in zip(nodes, inputs, strict=True)
    ]
    return tuple(i for i, value in enumerate(examples) if _is_symbolic(value))


def symbolic_shapes(module: fx.GraphModule, inputs: Sequence[Any]) -> tuple[int, ...]:
    """Positions of those that a program must be made for: tensors, and sizes that a node reads.

    Dynamo also makes an input of where a view begins in its storage. A pipeline that hands over
    `timesteps[i].expand(batch)` has another one at each step.
    """
    nodes = module.graph.find_nodes(op="placeholder")
    symbolic = symbolic_inputs(module, inputs)
    return tuple(i for i in symbolic if isinstance(inputs[i], Tensor) or nodes[i].users)


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


def as_plain(values: Sequence[Any]) -> list[Any]:
    """Inputs of a graph, those of GGUF and vLLM as plain tensors."""
    with torch._C.DisableTorchFunctionSubclass():
        return [v.as_subclass(Tensor) if is_packed(v) or is_loaded(v) else v for v in values]


def require_plain_tensors(inputs: Sequence[Any]) -> None:
    """Raise Unsupported if an input is no plain tensor, such as a quantized weight.

    The export takes no wrappers of tensors, and a graph of what they wrap would have other inputs
    than Dynamo's; what answers ops itself (GGUF in diffusers) makes constants of fakes.
    """
    for value in inputs:
        if is_loaded(value):
            continue
        answers = isinstance(value, Tensor) and _torch_function(type(value)) not in _PLAIN
        if answers or is_traceable_wrapper_subclass(value):
            name = type(value).__name__
            raise Unsupported(f"a weight or input is no plain tensor but a subclass, {name}")


def _torch_function(kind: type) -> Any:
    """How tensors of this type answer functions of torch."""
    function = kind.__torch_function__  # type: ignore[attr-defined]
    return getattr(function, "__func__", function)  # bound to each subclass that inherits it


_PLAIN = (_torch_function(Tensor), _torch_function(torch.nn.Parameter))
