"""Products of two or more values: matmul and einsum. What is summed over is mixed."""

from __future__ import annotations

import torch
from torch import fx

from specdiff.passes.rules.registry import (
    Facts,
    Link,
    broadcast_links,
    operand_at,
    operands_at,
    rank_of,
    shape_of,
    transfer,
)

aten = torch.ops.aten


@transfer(aten.matmul.default, aten.bmm.default)
def matmul(node: fx.Node) -> Facts:
    """Rows come from the left, columns from the right, batch axes from both by broadcasting."""
    left, right = operand_at(node, 0), operand_at(node, 1)
    if rank_of(left) < 2 or rank_of(right) < 2:
        return Facts()
    rank = rank_of(node)
    rows = Link(rank - 2, left, rank_of(left) - 2)
    columns = Link(rank - 1, right, rank_of(right) - 1)
    batch = [link for value in (left, right) for link in broadcast_links(node, value, trailing=2)]
    return Facts((rows, columns, *batch))


@transfer(aten.baddbmm.default)
def baddbmm(node: fx.Node) -> Facts:
    """A batched product added to a value that broadcasts to it."""
    added, left, right = (operand_at(node, i) for i in range(3))
    product = (Link(0, left, 0), Link(0, right, 0), Link(1, left, 1), Link(2, right, 2))
    return Facts((*product, *broadcast_links(node, added)))


@transfer(aten.einsum.default)
def einsum(node: fx.Node) -> Facts:
    """Axes that keep their letter; none for an equation with an ellipsis or a repeated letter."""
    equation = str(node.args[0]).replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    if not arrow or "." in equation or any(len(set(term)) < len(term) for term in terms):
        return Facts()
    links = [
        Link(output.index(letter), operand, axis)
        for term, operand in zip(terms, operands_at(node, 1), strict=True)
        for axis, letter in enumerate(term)
        if letter in output and shape_of(operand)[axis] == shape_of(node)[output.index(letter)]
    ]
    return Facts(tuple(links))
