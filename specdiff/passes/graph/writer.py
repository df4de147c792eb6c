"""Writer: builds a graph and evaluates each node on fake tensors as it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from specdiff import torch_adapter

aten = torch.ops.aten
PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack")
STRIDED_VIEWS = (aten.view.default, aten._unsafe_view.default)
"""Views that fail where `reshape` copies, depending on strides."""


class GraphWriter:
    """Writes one program. Each node gets a new `meta["val"]` and the provenance of its source."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.graph = fx.Graph()
        self.placeholders: list[fx.Node] = []
        self._module = module
        values = [n.meta["val"] for n in module.graph.find_nodes(op="placeholder")]
        fakes = [v for v in values if isinstance(v, torch.Tensor)]
        self._fake_mode = torch_adapter.fake_mode_of(fakes[0])
        self._provenance: dict[str, Any] = {}
        self.device = fakes[0].device

    def call(self, target: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
        """Write one op on nodes and constants."""
        if target is aten.view_as_complex.default:
            # rows, and values read from a cache, have other strides than the traced values
            args = (self.call(aten.contiguous.default, *args),)
        node = self.graph.call_function(target, args, kwargs)
        node.meta.update(self._provenance)
        values, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self._fake_mode, torch.no_grad():
            node.meta["val"] = target(*values, **named)
        return node

    def copy(self, node: fx.Node, values: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """Write `node` with its operands replaced."""
        self.follow(node)
        if node.op == "get_attr":
            new = self.graph.get_attr(str(node.target))
            new.meta = dict(node.meta)
            return new
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
        # a value read from a cache has other strides than the traced value
        viewed = node.target in STRIDED_VIEWS
        return self.call(aten.reshape.default if viewed else node.target, *args, **kwargs)

    def inline(self, graph: fx.Graph, inputs: Sequence[fx.Node]) -> Sequence[fx.Node]:
        """Write a graph of functions, applied to `inputs`; return its outputs."""
        made = dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=True))
        for node in graph.nodes:
            if node.op == "call_function":
                made[node] = self.copy(node, made)
        outputs: list[fx.Node] = []
        fx.map_arg(graph.output_node().args, outputs.append)
        return [made[node] for node in outputs]

    def follow(self, node: fx.Node) -> None:
        """Give nodes written from now on the provenance of `node`."""
        self._provenance = {k: node.meta[k] for k in PROVENANCE if k in node.meta}

    def copy_placeholder(self, node: fx.Node) -> fx.Node:
        """Add an input of the traced graph, with the metadata that marks it static."""
        new = self.graph.placeholder(node.name)
        new.meta = dict(node.meta)
        self.placeholders.append(new)
        return new

    def add_tensor(
        self, name: str, shape: tuple[int, ...], like: fx.Node, dtype: torch.dtype | None = None
    ) -> fx.Node:
        """Add another input with the device, and by default the dtype, of `like`."""
        node = self.graph.placeholder(name)
        value = like.meta["val"]
        with self._fake_mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype or value.dtype, device=value.device)
        self.placeholders.append(node)
        return node

    def add_cache(
        self, of: fx.Node, suffix: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> fx.Node:
        """Add another input, one that is updated in place and keeps its address."""
        node = self.add_tensor(f"cache_{of.name}{suffix}", shape, of, dtype)
        node.meta["static"] = True
        return node

    def permute(self, value: fx.Node, order: list[int]) -> fx.Node:
        """`value` with its axes in `order`."""
        if order == list(range(len(order))):
            return value
        return self.call(aten.permute.default, value, order)

    def to_module(self) -> fx.GraphModule:
        """The finished program."""
        self.graph.eliminate_dead_code()
        self.graph.lint()
        return fx.GraphModule(self._module, self.graph)
