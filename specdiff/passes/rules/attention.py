"""Scaled dot product attention: query rows are output rows, key rows are value rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from specdiff.passes.rules.registry import (
    Facts,
    Link,
    argument,
    operand_at,
    rank_of,
    shape_of,
    transfer,
)

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
OWN_CALL = "own_call"
"""`node.meta` key of an attention that was written as another op: its `AttentionCall`."""


@dataclass(frozen=True)
class Attention:
    """The operands of one attention: query [..., L, E], key [..., S, E], value [..., S, V]."""

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    causal: bool
    scale: float
    grouped: bool

    @classmethod
    def of(cls, node: fx.Node) -> Attention:
        """Read the operands of an attention node."""
        query, key, value = (operand_at(node, position) for position in range(3))
        scale = argument(node, 6, "scale")
        return cls(
            node,
            query,
            key,
            value,
            argument(node, 3, "attn_mask"),
            argument(node, 5, "is_causal", False),
            shape_of(query)[-1] ** -0.5 if scale is None else scale,
            argument(node, 7, "enable_gqa", False),
        )

    @property
    def sequences(self) -> tuple[tuple[fx.Node, int], ...]:
        """The sequence axes of query and key."""
        return ((self.query, rank_of(self.query) - 2), (self.key, rank_of(self.key) - 2))


def reads(user: fx.Node, node: fx.Node) -> bool:
    """Whether `user` is an attention with `node` as its key or value."""
    return user.target is ATTENTION and node in (Attention.of(user).key, Attention.of(user).value)


@transfer(ATTENTION)
def attention(node: fx.Node) -> Facts:
    """Output rows are query rows; batch and head axes come from the query."""
    query, key, value = (operand_at(node, position) for position in range(3))
    rank = rank_of(node)
    out = shape_of(node)
    links = []
    # sizes differ where a query is broadcast over samples, and where query heads share a key head
    for operand, leading in ((query, rank - 1), (key, rank - 2), (value, rank - 2)):
        if rank_of(operand) == rank:
            links += [
                Link(axis, operand, axis)
                for axis in range(leading)
                if shape_of(operand)[axis] == out[axis]
            ]
    return Facts(tuple(links))
