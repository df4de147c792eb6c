"""Tracing: a Dynamo graph as a graph of functional ATen ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_export_module
from torch._guards import TracingContext
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental.proxy_tensor import make_fx

from specdiff.errors import Unsupported, described
from specdiff.quantized import (
    after_vmap,
    for_vmap,
    is_loaded,
    is_packed,
    keep_whole,
    quantized_weights,
    skip_conversions,
)
from specdiff.torch_adapter.dynamo import is_restart
from specdiff.torch_adapter.ops import fake_mode_of
from specdiff.torch_adapter.placeholders import (
    copy_graph,
    require_plain_tensors,
    source_name,
)

WRITES_TO_INPUTS = "the graph writes to one of its inputs"
REPLACES_DATA = (
    "the graph gives a weight other data, as Linear8bitLt of bitsandbytes does at each call"
)


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
    loaded = tuple(i for i, value in enumerate(inputs) if is_loaded(value))
    inputs = _with_stand_ins(inputs, (*quantized, *packed, *loaded))
    require_plain_tensors(inputs)
    require_one_autocast(module.graph)
    if any(node.target is Tensor.set_ for node in module.graph.nodes):
        raise Unsupported(REPLACES_DATA)
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
            found[position] = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=value.device
            )
    return found


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
