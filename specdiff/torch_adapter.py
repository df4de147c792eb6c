"""The one file that touches private torch API: tracing, sources of inputs, hand-off to Inductor.

Works on torch 2.11 to 2.13; what was tried is in the comments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_export_module

InductorSettings = Mapping[str, Any]


def export_functional(module: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """Functional pre-dispatch ATen of a Dynamo graph; placeholders are the graph's own inputs.

    Attributes of the Dynamo graph (constants it lifted) stay attributes. Raises ValueError if the
    graph writes to an input.
    """
    with fx.traceback.preserve_node_meta():
        exported, signature = aot_export_module(
            module, list(inputs), trace_joint=False, pre_dispatch=True
        )
    if signature.buffers_to_mutate or getattr(signature, "user_inputs_to_mutate", None):
        raise ValueError("the graph writes to one of its inputs")
    _restore_attributes(module, exported, signature)
    _restore_placeholders(module, exported)
    return exported


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


def _restore_placeholders(source: fx.GraphModule, exported: fx.GraphModule) -> None:
    old = source.graph.find_nodes(op="placeholder")
    new = exported.graph.find_nodes(op="placeholder")
    for before, after in zip(old, new, strict=True):
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


def is_module_state(placeholder: fx.Node, value: Any) -> bool:
    """Whether an input is a parameter or buffer of the compiled module."""
    if isinstance(value, torch.nn.Parameter):
        return True
    name = source_name(placeholder)
    return "_parameters'" in name or "_buffers'" in name
