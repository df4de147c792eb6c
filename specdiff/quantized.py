"""Quantised linears, whatever their weights are made of: one op on rows.

A weight of torchao is a tensor subclass that answers `torch.nn.functional.linear` itself, and few
other ops. So the passes see a plain weight of its shape, and programs call just that function. A
weight of GGUF is bytes that the graph unpacks itself: there it is a plain tensor of them.

             Dynamo's graph                          passes and programs
    torchao  y = linear(x, Int8Tensor)               y = functional.linear(x, w)
    GGUF     b = torch.Tensor(GGUFParameter); ...    b = w; ...
             y = linear(x, unpacked)                 y = linear(x, unpacked)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from specdiff.errors import Unsupported

aten = torch.ops.aten
LINEAR: Any = functional.linear
"""What a linear with a quantised weight calls; all others call `aten.linear`."""
ONE_SCALE = "a linear quantises its input by one scale for all tokens"


@torch.library.custom_op("specdiff::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One that vmap leaves whole."""
    return functional.linear(x, weight, bias)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_linear.register_vmap
def _(info: Any, axes: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
    return _linear(x.movedim(axes[0], 0), weight, bias), 0


def is_quantized(value: object) -> bool:
    """Whether it is a weight of torchao."""
    return isinstance(value, Tensor) and type(value).__module__.startswith("torchao.")


def is_packed(value: object) -> bool:
    """Whether it is a weight of GGUF."""
    return isinstance(value, Tensor) and type(value).__module__.startswith("diffusers.quantizers.")


def is_loaded(value: object) -> bool:
    """Whether it is a parameter of vLLM: it knows how it is loaded, and answers no op itself."""
    return isinstance(value, Tensor) and type(value).__module__.startswith("vllm.")


def skip_conversions(graph: fx.Graph) -> None:
    """Remove the calls of `torch.Tensor` that a weight of GGUF is made a plain tensor by."""
    for node in graph.find_nodes(op="call_function", target=Tensor):
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)


def quantized_weights(module: fx.GraphModule, inputs: Sequence[Any]) -> tuple[int, ...]:
    """Positions of the quantised weights among the inputs of a Dynamo graph.

    Raises:
        Unsupported: one is no linear's weight, or its linear does not treat each row for itself.
    """
    found = []
    placeholders = module.graph.find_nodes(op="placeholder")
    for position, (node, value) in enumerate(zip(placeholders, inputs, strict=True)):
        if not is_quantized(value):
            continue
        if not all(_is_weight(node, user) for user in node.users):
            raise Unsupported(f"a weight is quantised ({type(value).__name__}) and no linear's")
        dynamic = getattr(value, "act_quant_kwargs", None)
        given = getattr(value, "act_quant_scale", None)
        granularity = type(getattr(dynamic, "granularity", None)).__name__
        if granularity == "PerTensor" and given is None:
            raise Unsupported(ONE_SCALE)
        found.append(position)
    return tuple(found)


def _is_weight(node: fx.Node, user: fx.Node) -> bool:
    """Whether a value is a linear's weight, and nothing else of it."""
    given = {**dict(zip(("input", "weight", "bias"), user.args, strict=False)), **user.kwargs}
    return user.target is LINEAR and [n for n, v in given.items() if v is node] == ["weight"]


def keep_whole(graph: fx.Graph, weights: Collection[fx.Node]) -> None:
    """Let the linears of these weights call what the weights answer."""
    for node in graph.find_nodes(op="call_function", target=aten.linear.default):
        if node.args[1] in weights:
            node.target = LINEAR


def for_vmap(module: fx.GraphModule) -> fx.GraphModule:
    """A copy whose quantised linears vmap leaves whole."""
    return _retargeted(module, LINEAR, torch.ops.specdiff.linear.default)


def after_vmap(module: fx.GraphModule) -> fx.GraphModule:
    """The linears of `for_vmap`, quantised again."""
    return _retargeted(module, torch.ops.specdiff.linear.default, LINEAR)


def _retargeted(module: fx.GraphModule, old: Any, new: Any) -> fx.GraphModule:
    nodes = module.graph.find_nodes(op="call_function", target=old)
    if not nodes:
        return module
    graph = fx.Graph()
    outputs = graph.graph_copy(module.graph, {})
    graph.output(outputs)
    for node in graph.find_nodes(op="call_function", target=old):
        if new is not LINEAR and len(node.args) == 2:
            node.args = (*node.args, None)
        node.target = new
    return fx.GraphModule(module, graph)
