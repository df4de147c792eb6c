"""Occupancy: on a GPU, give programs with few rows work for all of its processors.

Two ops of a selective program leave most of a GPU idle, as their kernels share out output rows:

    linear(x [1..2, K], w [N, K], b)    ->  sum(x * w, -1) + b: one pass over the weights
    attention(q [.., L, E], k, v)       ->  keys in P parts, each with all queries, and
                                            sum_p softmax_p(lse_p) * out_p

The second is flash decoding (Dao et al. 2023) by the kernel that PyTorch has. What a dense program
computes with many rows stays as it is.
"""

from __future__ import annotations

from math import prod
from operator import getitem

import torch
from torch import fx

from specdiff.passes.rewrite import call, replace
from specdiff.passes.rules.attention import ATTENTION, Attention
from specdiff.passes.rules.registry import argument, operand_at, shape_of

aten = torch.ops.aten
LINEAR = aten.linear.default
FLASH = {
    "cuda": aten._scaled_dot_product_flash_attention.default,
    "cpu": aten._scaled_dot_product_flash_attention_for_cpu.default,
}
"""By device type; the one for CPUs serves tests."""
HALVES = (torch.float16, torch.bfloat16)
THIN_ROWS = 2
"""Rows of a linear layer up to which a matrix kernel reads the weights more slowly than a sum."""
LEAST_WEIGHTS = 1 << 20
"""Numbers in a weight from which on reading it takes longer than starting a kernel."""
QUERY_TILE = 128
"""Queries that a processor takes at once."""
MOST_PARTS = 8


def fill_processors(program: fx.GraphModule) -> None:
    """Rewrite an emitted program in place, if it is for a GPU."""
    values = (node.meta["val"] for node in program.graph.find_nodes(op="placeholder"))
    device = next(value.device for value in values if isinstance(value, torch.Tensor))
    if device.type != "cuda":
        return
    sum_thin_linears(program.graph)
    split_keys(program.graph, torch.cuda.get_device_properties(device).multi_processor_count)
    program.recompile()


def sum_thin_linears(graph: fx.Graph) -> int:
    """Turn linear layers of at most `THIN_ROWS` rows into sums; returns how many."""
    thin = [node for node in graph.find_nodes(op="call_function", target=LINEAR) if _is_thin(node)]
    for node in thin:
        rows, weight, bias = operand_at(node, 0), operand_at(node, 1), argument(node, 2, "bias")
        products = call(node, aten.mul.Tensor, call(node, aten.unsqueeze.default, rows, -2), weight)
        total = call(node, aten.sum.dim_IntList, products, [-1])
        replace(node, total if bias is None else call(node, aten.add.Tensor, total, bias))
    return len(thin)


def _is_thin(node: fx.Node) -> bool:
    weight = operand_at(node, 1)
    rows = prod(shape_of(operand_at(node, 0))[:-1])
    return rows <= THIN_ROWS and prod(shape_of(weight)) >= LEAST_WEIGHTS


def split_keys(graph: fx.Graph, processors: int) -> int:
    """Split attentions whose queries do not fill the processors; returns how many."""
    count = 0
    for node in graph.find_nodes(op="call_function", target=ATTENTION):
        parts = _parts(node, processors)
        if parts > 1:
            _split(node, parts)
            count += 1
    return count


def _parts(node: fx.Node, processors: int) -> int:
    """In how many parts of equal length the keys are best taken; 1 where that is not known."""
    found = Attention.of(node)
    query, key, value = (shape_of(x) for x in (found.query, found.key, found.value))
    plain = found.mask is None and not found.causal and not found.grouped
    alike = len(query) == 4 and query[:2] == key[:2] == value[:2] and key == value
    if not (plain and alike and node.meta["val"].dtype in HALVES and query[-1] % 8 == 0):
        return 1
    tiles = query[0] * query[1] * -(-query[2] // QUERY_TILE)

    def rounds(parts: int) -> float:
        """Of all processors, each as long as one part takes."""
        return -(-tiles * parts // processors) / parts

    whole = [parts for parts in range(1, MOST_PARTS + 1) if key[2] % parts == 0]
    return min(whole, key=rounds)


def _split(node: fx.Node, parts: int) -> None:
    found = Attention.of(node)
    samples, heads, rows, width = shape_of(found.query)
    length = shape_of(found.key)[2] // parts
    query = call(node, aten.unsqueeze.default, found.query, 1)
    query = call(node, aten.expand.default, query, [samples, parts, heads, rows, width])
    query = call(node, aten.reshape.default, query, [samples * parts, heads, rows, width])
    key, value = (_in_parts(node, each, parts, length) for each in (found.key, found.value))
    flash = FLASH[node.meta["val"].device.type]
    result = call(node, flash, query, key, value, 0.0, False, scale=found.scale)
    outputs, sums = (_item(node, result, index) for index in (0, 1))
    outputs = call(node, aten.reshape.default, outputs, [samples, parts, heads, rows, width])
    sums = call(node, aten.reshape.default, sums, [samples, parts, heads, rows, 1])
    shares = call(node, aten.softmax.int, sums, 1, torch.float32)
    merged = call(node, aten.sum.dim_IntList, call(node, aten.mul.Tensor, outputs, shares), [1])
    replace(node, call(node, aten._to_copy.default, merged, dtype=node.meta["val"].dtype))


def _in_parts(before: fx.Node, value: fx.Node, parts: int, length: int) -> fx.Node:
    """Keys or values [B, H, P * S, E] as [B * P, H, S, E], a view where caches are read."""
    samples, heads, _, width = shape_of(value)
    split = call(before, aten.reshape.default, value, [samples, heads, parts, length, width])
    moved = call(before, aten.permute.default, split, [0, 2, 1, 3, 4])
    return call(before, aten.reshape.default, moved, [samples * parts, heads, length, width])


def _item(before: fx.Node, value: fx.Node, index: int) -> fx.Node:
    with before.graph.inserting_before(before):
        item = before.graph.call_function(getitem, (value, index))
    item.meta["val"] = value.meta["val"][index]
    return item
