"""Normalize: a Dynamo graph becomes functional ATen; attention, norms and linears stay one op each.

    before                              after
    a, b = chunk(x, 2, -1)              a = slice(x, -1, 0, n); b = slice(x, -1, n, 2 * n)
    y = x.view_as(z)                    y = view(x, [shape of z])
    softmax(q @ k.T) @ v                scaled_dot_product_attention(q, k, v)
    flash_attn_forward(q, k, v)[0]      scaled_dot_product_attention(q, k, v), axes permuted
    r = rms_norm_(q, weight); q = r[1]  q = row_result(rms_norm_, ..., q=q, weight=weight)
    buffer[:, 4:8] = x                  buffer = cat([buffer[:, :4], x, buffer[:, 8:]], 1)
    r1 = table[ids]; r2 = table[ids]    r1 = r2 = table[ids]

So every later pass sees one tensor per node, attention as one op, and writes as joins, which keep
tokens; equal expressions are computed once, and then gathered once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from specdiff import torch_adapter
from specdiff.errors import Unsupported
from specdiff.passes.base import Pass, PassError, check_values
from specdiff.passes.graph.python_file import op_counts
from specdiff.passes.normalize.fuse_attention import drops_nothing, fuse_attention
from specdiff.passes.normalize.read_attention import read_attention
from specdiff.passes.normalize.read_rowwise import read_rowwise
from specdiff.passes.normalize.rewrite import call, replace
from specdiff.passes.rules.attention import ATTENTION
from specdiff.passes.rules.registry import argument, operand_at, operands_at, start_of

aten = torch.ops.aten
SPLITS = (
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
)
ALLOCATIONS = {
    aten.empty.memory_format: aten.zeros.default,
    aten.empty_like.default: aten.zeros_like.default,
    aten.new_empty.default: aten.new_zeros.default,
}
"""Ops that return uninitialised memory, and their like with zeros, so that all runs agree."""
LIKENESS = {
    aten.view_as.default: aten.view.default,
    aten.reshape_as.default: aten.reshape.default,
    aten.expand_as.default: aten.expand.default,
}


@dataclass(frozen=True)
class DynamoGraph:
    """What Dynamo hands to a backend."""

    module: fx.GraphModule
    inputs: Sequence[Any]


class NormalizePass(Pass[DynamoGraph, fx.GraphModule]):
    """From a Dynamo graph to functional pre-dispatch ATen; placeholders keep their order."""

    name = "normalize"

    def __init__(self, export: Callable[[fx.GraphModule, Sequence[Any]], fx.GraphModule]) -> None:
        self._export = export

    def apply(self, value: DynamoGraph) -> fx.GraphModule:
        """Export and rewrite. Raises Unsupported unless outputs are functions of input values."""
        module = self._export(value.module, value.inputs)
        require_static_shapes(module.graph)
        read_attention(module.graph)
        read_rowwise(module.graph)
        require_functions_of_values(module.graph)
        remove_assertions(module.graph)
        replace_tuples(module.graph)
        replace_likeness(module.graph)
        replace_permutations(module.graph)
        remove_idle_squeezes(module.graph)
        replace_writes(module.graph)
        fuse_attention(module.graph)
        share_equal_nodes(module.graph)
        module.graph.eliminate_dead_code()
        module.recompile()
        return module

    def verify(self, value: DynamoGraph, result: fx.GraphModule) -> None:
        """Check for the same inputs, a value at every node, and no op that mutates."""
        check_values(result.graph)
        if len(result.graph.find_nodes(op="placeholder")) != len(value.inputs):
            raise PassError("normalize changed the number of inputs")
        for node in result.graph.nodes:
            if torch_adapter.mutates(node.target):
                raise PassError(f"{node.name} ({node.target}) mutates its input")

    def summary(self, result: fx.GraphModule) -> str:
        """The most frequent ops."""
        counts = op_counts(result.graph)
        most = ", ".join(f"{count} {name}" for name, count in list(counts.items())[:5])
        return f"{len(counts)} kinds of functional ops, most often {most}"


def require_static_shapes(graph: fx.Graph) -> None:
    """Raise Unsupported if any size in `graph` is symbolic."""
    for node in graph.nodes:
        value = node.meta.get("val")
        parts = value.shape if isinstance(value, torch.Tensor) else (value,)
        if any(isinstance(part, torch.SymInt | torch.SymFloat | torch.SymBool) for part in parts):
            raise Unsupported("a size in the graph depends on the values of a tensor")


def require_functions_of_values(graph: fx.Graph) -> None:
    """Raise Unsupported for random numbers, graphs within the graph, and reads by strides."""
    for node in graph.find_nodes(op="call_function", target=aten.as_strided.default):
        raise Unsupported(f"{node.name} reads memory by strides, whatever tokens lie there")
    for node in graph.nodes:
        if node.op == "get_attr" and "val" not in node.meta:
            raise Unsupported(f"{node.name} is a graph of its own (flex attention, torch.cond)")
        if torch.Tag.nondeterministic_seeded in _tags(node) and not _draws_nothing(node):
            raise Unsupported(f"{node.name} draws random numbers: is the model in eval mode?")


def _draws_nothing(node: fx.Node) -> bool:
    if node.target is ATTENTION:
        return not argument(node, 4, "dropout_p", 0.0)
    return drops_nothing(node)


def remove_assertions(graph: fx.Graph) -> None:
    """Remove `_assert_tensor_metadata`: tracing has checked what it asserts."""
    for node in graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        graph.erase_node(node)


def replace_tuples(graph: fx.Graph) -> None:
    """Rewrite `getitem(split(x), i)` to a slice and `getitem(unbind(x), i)` to a select."""
    for node in graph.find_nodes(op="call_function", target=operator.getitem):
        source, position = node.args
        rewritten = _single_output(source, position)
        if rewritten is None:
            continue
        target, args = rewritten
        replace(node, call(node, target, *args))


def _single_output(source: fx.Node, position: int) -> tuple[Any, tuple[Any, ...]] | None:
    if source.target is aten.unbind.int:
        return aten.select.int, (operand_at(source, 0), argument(source, 1, "dim", 0), position)
    if source.target not in SPLITS:
        return None
    value = operand_at(source, 0)
    dim = argument(source, 2, "dim", 0)
    lengths = [piece.shape[dim] for piece in source.meta["val"]]
    start = sum(lengths[:position])
    return aten.slice.Tensor, (value, dim, start, start + lengths[position])


def replace_likeness(graph: fx.Graph) -> None:
    """Replace an operand that only gives dtype, device or shape by these themselves."""
    for node in list(graph.nodes):
        wanted = node.meta.get("val")
        if node.target is aten.type_as.default:
            like = {"dtype": wanted.dtype, "device": wanted.device}
            replace(node, call(node, aten._to_copy.default, operand_at(node, 0), **like))
        elif node.target in LIKENESS:
            shape = list(wanted.shape)
            replace(node, call(node, LIKENESS[node.target], operand_at(node, 0), shape))


def replace_permutations(graph: fx.Graph) -> None:
    """Rewrite an einsum that only permutes the axes of one operand to a permutation."""
    for node in graph.find_nodes(op="call_function", target=aten.einsum.default):
        equation, operands = str(node.args[0]).replace(" ", ""), operands_at(node, 1)
        letters, _, moved = equation.partition("->")
        if len(operands) == 1 and sorted(letters) == sorted(set(moved)) and moved.isalpha():
            order = [letters.index(letter) for letter in moved]
            replace(node, call(node, aten.permute.default, operands[0], order))


def remove_idle_squeezes(graph: fx.Graph) -> None:
    """Remove squeezes without effect: on a token axis they would have one with one active token."""
    for node in graph.find_nodes(op="call_function", target=aten.squeeze.dim):
        operand = operand_at(node, 0)
        if operand.meta["val"].shape == node.meta["val"].shape:
            replace(node, operand)


def replace_writes(graph: fx.Graph) -> None:
    """Rewrite writes to slices as joins, so that what is overwritten is not an operand."""
    for node in list(graph.nodes):
        if node.target in ALLOCATIONS:
            named = {k: v for k, v in node.kwargs.items() if k != "memory_format"}
            replace(node, call(node, ALLOCATIONS[node.target], *node.args, **named))
        elif node.target is aten.copy.default:
            replace(node, _copied(node))
        elif node.target is aten.slice_scatter.default and argument(node, 5, "step", 1) == 1:
            replace(node, _joined(node))


def _copied(node: fx.Node) -> fx.Node:
    """The source of a copy, in the dtype and shape of its destination."""
    value, source = node.meta["val"], operand_at(node, 1)
    source = _converted(node, source)
    if source.meta["val"].shape != value.shape:
        source = call(node, aten.expand.default, source, list(value.shape))
    return source


def _converted(node: fx.Node, source: fx.Node) -> fx.Node:
    """`source` in the dtype of what it is written to."""
    dtype = node.meta["val"].dtype
    if source.meta["val"].dtype == dtype:
        return source
    return call(node, aten._to_copy.default, source, dtype=dtype)


def _joined(node: fx.Node) -> fx.Node:
    """A join of the destination before the slice, the source, and the destination after it."""
    destination, source = operand_at(node, 0), _converted(node, operand_at(node, 1))
    dim, size = argument(node, 2, "dim", 0), node.meta["val"].shape
    start = start_of(node, 3, size[dim])
    stop = start + source.meta["val"].shape[dim]
    pieces = [
        *_remaining(node, destination, dim, 0, start),
        source,
        *_remaining(node, destination, dim, stop, size[dim]),
    ]
    return pieces[0] if len(pieces) == 1 else call(node, aten.cat.default, pieces, dim)


def _remaining(node: fx.Node, value: fx.Node, dim: int, start: int, stop: int) -> Iterator[fx.Node]:
    """The values that make up `value` from `start` to `stop`: of a join, its pieces there."""
    if start >= stop:
        return
    if (start, stop) == (0, value.meta["val"].shape[dim]):
        yield value
    elif value.target is aten.cat.default and argument(value, 1, "dim", 0) == dim:
        offset = 0
        for piece in operands_at(value, 0):
            # an empty one-dimensional operand is legal and joins nothing
            shape = piece.meta["val"].shape
            length = shape[dim] if len(shape) == value.meta["val"].dim() else 0
            first, last = max(start - offset, 0), min(stop - offset, length)
            yield from _remaining(node, piece, dim, first, last)
            offset += length
    else:
        yield call(node, aten.slice.Tensor, value, dim, start, stop)


def share_equal_nodes(graph: fx.Graph) -> None:
    """Compute equal deterministic expressions once."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in _tags(node):
            continue
        key = (node.target, _freeze(node.args), _freeze(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _tags(node: fx.Node) -> Sequence[torch.Tag]:
    return getattr(node.target, "tags", ())


def _freeze(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_freeze(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, _freeze(v)) for k, v in value.items()))
    # 1, 1.0 and True are equal to Python but not to an op's dtype; 0.0 and -0.0 not to a quotient
    return (type(value), repr(value) if isinstance(value, float) else value)
