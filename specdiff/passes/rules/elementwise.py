"""Elementwise ops: axes are aligned from the right, by broadcasting."""

from __future__ import annotations

import torch
from torch import fx

from specdiff.passes.rules.registry import Facts, broadcast_links, is_tensor, transfer

aten = torch.ops.aten


@transfer(
    torch.Tag.pointwise,
    aten.dropout.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
)
def elementwise(node: fx.Node) -> Facts:
    """Axis i of the output is axis i - (rank difference) of an operand that has its full size."""
    operands = filter(is_tensor, node.all_input_nodes)
    return Facts(tuple(link for value in operands for link in broadcast_links(node, value)))
