"""Row-wise custom ops, such as norms: they work along the last axis and leave the others alone."""

from __future__ import annotations

from torch import fx

from specdiff.passes.rules.registry import (
    BY_NAME,
    Facts,
    Link,
    is_tensor,
    rank_of,
    registered_name,
    shape_of,
)

KNOWN = ("vllm_ir::rms_norm", "xfuser::aiter_rms_norm")
"""Norms of serving stacks that write to no operand."""


def rowwise(node: fx.Node) -> Facts:
    """All axes but the last, of each operand that has them; weights have one axis.

    No facts where another operand, such as a table of rotations, may go by rows in a way of its
    own.
    """
    leading = shape_of(node)[:-1]
    links = []
    for operand in filter(is_tensor, node.all_input_nodes):
        if rank_of(operand) > 1 and shape_of(operand)[:-1] == leading:
            links += [Link(axis, operand, axis) for axis in range(len(leading))]
        elif rank_of(operand) > 1 or not operand.meta["val"].is_floating_point():
            return Facts()
    return Facts(tuple(links))


def register_rowwise(op: object) -> None:
    """Say that a custom op computes each row of its output from the same rows of its operands.

    Selected steps then call it with the rows that they compute: a norm of `[B, N, C]` or
    `[B, N, H, D]` with `[B, K, C]` or `[B, K, H, D]`. Without this it is right, too, but computed
    whole. Call this before compiling.

    The op returns one tensor and writes to none. A row lies along the last axis. Operands of the
    output's shape but for the last axis go by rows; those of one axis are weights, which all rows
    share. A call with other operands, such as a table of rotations `[N, D]`, is computed whole.

    Args:
        op: the op, or its name, such as "my_kernels::rms_norm"; it need not exist yet.

    Raises:
        OptionError: `op` is no op of `torch.ops`.
    """
    BY_NAME[registered_name(op)] = rowwise


for known in KNOWN:
    register_rowwise(known)
