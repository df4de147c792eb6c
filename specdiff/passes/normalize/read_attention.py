"""Read attention: an op of the attention table becomes `scaled_dot_product_attention`.

    before                                      after
    o = flash_attn_forward(q, k, v)[0]          q4 = permute(q, 0, 2, 1, 3), k4 and v4 alike
        q [B, L, H, E]                          o4 = scaled_dot_product_attention(q4, k4, v4)
                                                o  = permute(o4, 0, 2, 1, 3)

So every later pass sees one kind of attention. Programs call the op itself again
(`specdiff.passes.emit.own_call`), but where a mask says which keys each query sees.
"""

from __future__ import annotations

import torch
from torch import fx

from specdiff.passes.normalize.rewrite import call, refresh, replace, reshaped
from specdiff.passes.rules.attention import ATTENTION, OWN_CALL
from specdiff.passes.rules.attention_ops import AttentionCall
from specdiff.passes.rules.registry import shape_of

aten = torch.ops.aten
SWAPPED = [0, 2, 1, 3]
"""From [B, N, H, D] to [B, H, N, D], and back."""


def read_attention(graph: fx.Graph) -> None:
    """Rewrite every call of an op of the table that is plain attention."""
    moved: set[fx.Node] = set()
    for node in list(graph.nodes):
        found = AttentionCall.of(node)
        if found is not None and found.why_not() is None:
            moved |= _rewritten(found)
    if moved:
        refresh(graph, moved)


def _rewritten(found: AttentionCall) -> set[fx.Node]:
    """Put the attention in place of the call; return what has other strides than before."""
    node = found.node
    results = [node] if isinstance(node.meta["val"], torch.Tensor) else list(node.users)
    if not results:
        return set()
    first = min(results)
    query, key, value = (_with_heads(first, each, found) for each in found.operands)
    grouped = {"enable_gqa": True} if shape_of(query)[1] != shape_of(key)[1] else {}
    options = (found.mask, 0.0, found.causal)
    attention = call(first, ATTENTION, query, key, value, *options, scale=found.scale, **grouped)
    if not found.causal and not found.others:
        attention.meta[OWN_CALL] = found
    output = attention
    if found.axes == "BNHD":
        output = call(first, aten.permute.default, output, SWAPPED)
    output = reshaped(first, output, shape_of(first))
    if results == [node]:
        return replace(node, output)
    moved = set().union(*(replace(result, output) for result in results))
    node.graph.erase_node(node)
    return moved


def _with_heads(before: fx.Node, operand: fx.Node, found: AttentionCall) -> fx.Node:
    """An operand as [B, H, N, D]."""
    if found.packed:
        samples, (first, *rest) = found.samples, shape_of(operand)
        assert samples is not None
        shape = (1, first, *rest) if found.axes == "BHND" else (samples, first // samples, *rest)
        operand = reshaped(before, operand, shape)
    if found.axes == "BNHD":
        operand = call(before, aten.permute.default, operand, SWAPPED)
    return operand
