"""Own call: an attention that was written as another op is computed by that op.

of an attention with rows, read from flash_attn(q, k, v) with q [B, N, H, D]

q  = permute(q4[rows], 0, 2, 1, 3)   [B, K, H, D], keys and values whole
o4 = permute(flash_attn(q, k, v)[0], 0, 2, 1, 3)
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from specdiff.passes.graph.writer import GraphWriter
from specdiff.passes.normalize.read_attention import SWAPPED
from specdiff.passes.rules.attention_ops import LENGTHS, STARTS, AttentionCall
from specdiff.passes.rules.registry import shape_of

aten = torch.ops.aten


def own_call(
    writer: GraphWriter, own: AttentionCall, query: fx.Node, key: fx.Node, value: fx.Node
) -> fx.Node:
    """Write the call with these operands, each [B, H, N, D]; the result is [B, H, N, V]."""
    operands = [
        _as_given(writer, own, new, old)
        for new, old in zip((query, key, value), own.operands, strict=True)
    ]
    given: dict[str, object] = dict(zip(own.tensors, operands, strict=True))
    counts = [(shape_of(each)[0], shape_of(each)[2]) for each in (query, key)]
    for (samples, tokens), starts, lengths in zip(counts, STARTS, LENGTHS, strict=True):
        for name in starts:
            if (before := own.arguments.get(name)) is not None:
                given[name] = _starts(writer, before, samples, tokens)
        for name in lengths:
            if own.arguments.get(name) is not None:
                given[name] = tokens
    result = _call(writer, own, given)
    if not isinstance(result.meta["val"], torch.Tensor):
        result = writer.call(operator.getitem, result, 0)
    if own.packed:
        samples, heads, tokens, _ = shape_of(query)
        wide = shape_of(result)[-1]
        lead = [samples, heads, tokens] if own.axes == "BHND" else [samples, tokens, heads]
        result = writer.call(aten.reshape.default, result, [*lead, wide])
    return writer.permute(result, SWAPPED) if own.axes == "BNHD" else result


def _call(writer: GraphWriter, own: AttentionCall, given: dict[str, object]) -> fx.Node:
    """The op on its own arguments but for those that are given."""
    values = [(name, given.get(name, value)) for name, value in own.arguments.items()]
    args = [value for _, value in values[: own.positional]]
    kwargs = {
        name: value for name, value in values[own.positional :] if name in {*own.named, *given}
    }
    return writer.call(own.node.target, *args, **kwargs)


def _as_given(writer: GraphWriter, own: AttentionCall, new: fx.Node, old: fx.Node) -> fx.Node:
    """[B, H, N, D] in the op's order of axes, contiguous if it was: kernels may rely on it."""
    if own.axes == "BNHD":
        new = writer.permute(new, SWAPPED)
    if own.packed:
        shape = shape_of(new)
        lead = shape[1:2] if own.axes == "BHND" else (shape[0] * shape[1],)
        new = writer.call(aten.reshape.default, new, [*lead, *shape[2:]])
    strict = old.meta["val"].is_contiguous() and not new.meta["val"].is_contiguous()
    return writer.call(aten.contiguous.default, new) if strict else new


def _starts(writer: GraphWriter, before: fx.Node, samples: int, tokens: int) -> fx.Node:
    value = before.meta["val"]
    options = {"dtype": value.dtype, "device": value.device}
    return writer.call(aten.arange.start_step, 0, samples * tokens + 1, tokens, **options)
