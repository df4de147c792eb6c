"""Fuse attention: attention that is written out becomes one op, by which tokens are found.

    before                                     after
    q3 = view(q, [B * H, N, D])                (views are gone: heads are an axis again)
    k3 = view(k, [B * H, S, D])
    s  = baddbmm(mask, q3, transpose(k3))
    w  = softmax(s * scale, -1)                out = scaled_dot_product_attention(
    o3 = bmm(to(w, bf16), v3)                            q, k, v, mask, scale=scale)
    out = view(o3, [B, H, N, D])

The match starts at the softmax and goes outwards to both products. What does not match exactly
stays as it is: correct, only slower. The two forms differ in one case: if an added mask is -inf for
every key, the op gives zeros and the written form nan. Scores that a condition overwrites
(masked_fill) are not fused, since a model may rely on their nan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import fx

from specdiff.passes.normalize.rewrite import call, collapse_views, refresh, replace, reshaped
from specdiff.passes.rules.attention import ATTENTION
from specdiff.passes.rules.registry import (
    argument,
    axis_index,
    facts_of,
    is_tensor,
    operand_at,
    rank_of,
    shape_of,
)
from specdiff.passes.rules.shape import VIEWS

aten = torch.ops.aten
SOFTMAX = (aten.softmax.int, aten._softmax.default)
PRODUCTS = (aten.matmul.default, aten.bmm.default)
CONVERSIONS = (aten.to.dtype, aten._to_copy.default)


@dataclass(frozen=True)
class Written:
    """softmax(scale * query @ right + mask) @ value; `right` is the keys, or their transpose."""

    query: fx.Node
    right: fx.Node
    transposed: bool
    value: fx.Node
    mask: fx.Node | None
    scale: float


def fuse_attention(graph: fx.Graph) -> None:
    """Fuse every attention that is written out; collapse every view of a view."""
    _remove_idle_dropouts(graph)
    moved = collapse_views(graph)
    for node in list(graph.nodes):
        result = _weighted_values(node) if node.target in SOFTMAX else None
        written = _match(node, result) if result is not None else None
        if result is not None and written is not None:
            moved |= replace(result, _fused(written, result))
    graph.eliminate_dead_code()
    moved |= collapse_views(graph)
    refresh(graph, moved)


def drops_nothing(node: fx.Node) -> bool:
    """Whether `node` is a dropout without effect."""
    if node.target is not aten.dropout.default:
        return False
    return not argument(node, 1, "p") or not argument(node, 2, "train")


def _remove_idle_dropouts(graph: fx.Graph) -> None:
    # fx counts every dropout as a random draw, so it would not remove the dead weights
    for node in list(graph.nodes):
        if drops_nothing(node):
            replace(node, operand_at(node, 0))


def _weighted_values(softmax: fx.Node) -> fx.Node | None:
    """Follow the weights forwards to the product with the values, their only use."""
    node, path = softmax, [softmax]
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target in PRODUCTS:
            left = user.args[0] is node and user.args[1] is not node
            return user if left and all(_is_precise(n, user) for n in path) else None
        if not _is_conversion(user):
            return None
        node = user
        path.append(node)
    return None


def _match(softmax: fx.Node, result: fx.Node) -> Written | None:
    """The attention with the weights `softmax` and the output `result`; None if it is none."""
    if axis_index(argument(softmax, 1, "dim"), rank_of(softmax)) != rank_of(softmax) - 1:
        return None
    scores = _scores(operand_at(softmax, 0), result)
    if scores is None:
        return None
    product, mask, scale = scores
    left, right = _factors(product)
    query, of_query = _unscaled(left, result)
    right, of_right = _unscaled(right, result)
    transposed = not _swaps_last_axes(right)
    key, of_key = (right, 1.0) if transposed else _unscaled(operand_at(right, 0), result)
    value = operand_at(result, 1)
    scale *= of_query * of_right * of_key
    written = Written(query, key, transposed, value, mask, scale)
    return written if _is_exact(written, product) else None


def _scores(
    node: fx.Node, result: fx.Node, mask: fx.Node | None = None, scale: float = 1.0
) -> tuple[fx.Node, fx.Node | None, float] | None:
    """Follow the scores back to the product of queries and keys; collect mask and scale."""
    if len(node.users) != 1 or not _is_precise(node, result):
        return None
    factor = _factor(node)
    if factor is not None or _is_conversion(node):
        return _scores(operand_at(node, 0), result, mask, scale * (factor or 1.0))
    # the op adds one mask, and adds it after scaling
    may_add = mask is None and scale == 1.0
    if node.target is aten.baddbmm.default:
        beta, alpha = argument(node, 3, "beta", 1), argument(node, 4, "alpha", 1)
        if beta == 0 and 0 < alpha < inf:
            return node, mask, scale * alpha
        return (node, operand_at(node, 0), alpha) if may_add and beta == 1 and alpha > 0 else None
    if node.target is aten.add.Tensor and may_add and argument(node, 2, "alpha", 1) == 1:
        return _masked_scores(node, result)
    return (node, mask, scale) if node.target in PRODUCTS else None


def _masked_scores(added: fx.Node, result: fx.Node) -> tuple[fx.Node, fx.Node | None, float] | None:
    first, second = added.args[:2]
    for scores, mask in ((first, second), (second, first)):
        if not is_tensor(scores) or not is_tensor(mask) or scores is mask:
            continue
        if shape_of(scores) != shape_of(added):
            continue
        traced_back = _scores(scores, result, mask)
        if traced_back is not None:
            return traced_back
    return None


def _factors(product: fx.Node) -> tuple[fx.Node, fx.Node]:
    first = 1 if product.target is aten.baddbmm.default else 0
    return operand_at(product, first), operand_at(product, first + 1)


def _factor(node: fx.Node) -> float | None:
    """The positive number by which `node` multiplies its operand."""
    multiplies = node.target in (aten.mul.Tensor, aten.mul.Scalar)
    divides = node.target in (aten.div.Tensor, aten.div.Scalar)
    number = node.args[1] if multiplies or divides else None
    if not isinstance(number, int | float) or not 0 < number < inf or not is_tensor(node.args[0]):
        return None
    return float(number) if multiplies else 1 / number


def _unscaled(node: fx.Node, result: fx.Node) -> tuple[fx.Node, float]:
    """`node` before scaling and before conversion to a more precise dtype; and the scale."""
    scale = 1.0
    while True:
        factor = _factor(node)
        raised = _is_conversion(node) and _dtype(node) is not _dtype(result)
        if factor is None and not raised:
            return node, scale
        scale *= factor or 1.0
        node = operand_at(node, 0)


def _swaps_last_axes(node: fx.Node) -> bool:
    if node.target not in (aten.permute.default, aten.transpose.int):
        return False
    rank = rank_of(node)
    order = [link.in_axis for link in facts_of(node).links]
    return order == [*range(rank - 2), rank - 1, rank - 2]


def _is_exact(written: Written, product: fx.Node) -> bool:
    """Whether the op accepts these operands and computes the same from them."""
    operands = [written.query, written.right, written.value]
    leads = {shape_of(operand)[:-2] for operand in (*operands, product)}
    if len(leads) > 1 or leads <= {()}:
        return False  # products broadcast; the op does so only in some kernels
    mask, shape = written.mask, shape_of(product)
    if mask is not None:
        operands.append(mask)
        sizes = shape_of(mask)
        placed = zip(reversed(sizes), reversed(shape), strict=False)
        fits = 2 <= len(sizes) <= len(shape) and sizes[-1] == shape[-1]
        if not fits or any(size not in (1, whole) for size, whole in placed):
            return False
    return len({_dtype(operand) for operand in operands}) == 1 and 0 < written.scale < inf


def _is_conversion(node: fx.Node) -> bool:
    if node.target not in CONVERSIONS:
        return False
    return bool(node.meta["val"].device == operand_at(node, 0).meta["val"].device)


def _is_precise(node: fx.Node, result: fx.Node) -> bool:
    """Whether `node` is at least as precise as the result: then the op rounds no earlier."""
    inner, outer = _dtype(node), _dtype(result)
    if not (inner.is_floating_point and outer.is_floating_point):
        return False
    return torch.finfo(inner).eps <= torch.finfo(outer).eps


def _dtype(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def _fused(written: Written, result: fx.Node) -> fx.Node:
    """The attention as one op; heads that were merged into the batch get their axis back."""
    query, key, value, mask = written.query, written.right, written.value, written.mask
    lead = _merged_axes(query, key, value)
    if lead is not None:
        query, key, value = (
            reshaped(result, operand, (*lead, *shape_of(operand)[1:]))
            for operand in (query, key, value)
        )
        mask = _split_mask(result, mask, lead)
    if written.transposed:
        key = call(result, aten.transpose.int, key, -2, -1)
    options = (mask, 0.0, False)
    fused = call(result, ATTENTION, query, key, value, *options, scale=written.scale)
    return reshaped(result, fused, shape_of(result))


def _merged_axes(*operands: fx.Node) -> Sequence[int] | None:
    """Samples and heads, where one of [B * H, N, D] is a view of [B, H, N, D]."""
    for operand in operands:
        if rank_of(operand) == 3 and operand.target in VIEWS:
            shape = shape_of(operand_at(operand, 0))
            if len(shape) == 4 and shape[2:] == shape_of(operand)[1:]:
                return shape[:2]
    return None


def _split_mask(result: fx.Node, mask: fx.Node | None, lead: Sequence[int]) -> fx.Node | None:
    if mask is None or rank_of(mask) < 3 or shape_of(mask)[0] == 1:
        return mask
    if mask.target is aten.repeat_interleave.self_int:
        repeats, dim = argument(mask, 1, "repeats"), argument(mask, 2, "dim")
        if dim == 0 and repeats == lead[1]:
            # one mask for all heads: its batch axis was never merged
            return call(result, aten.unsqueeze.default, operand_at(mask, 0), 1)
    return reshaped(result, mask, (*lead, *shape_of(mask)[1:]))
