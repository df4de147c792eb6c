"""Row-wise custom ops, such as norms: they work along the last axis and leave the others alone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from specdiff.passes.rules.registry import (
    BY_NAME,
    Facts,
    Link,
    broadcast_links,
    is_tensor,
    operand_at,
    operands,
    rank_of,
    registered_name,
    same_axes,
    shape_of,
)

KNOWN = (
    "vllm_ir::rms_norm",
    "xfuser::aiter_rms_norm",
    "sglang::triton_one_pass_rms_norm_cuda",
    "sglang::rmsnorm_scale_shift_per_token_cuda",
)
"""Norms of serving stacks that write to no operand."""
MODULATED = "sglang::fused_norm_scale_shift"
LINEAR = "sglang::diffusion_fused_linear_gelu_tanh"


def rowwise(node: fx.Node) -> Facts:
    """All axes but the last, of each operand that has them; weights have one axis.

    An axis of length 1 is shared by all rows, as where a scale `[B, 1, C]` goes with `[B, N, C]`.
    No facts where another operand, such as a table of rotations, may go by rows in a way of its
    own.
    """
    leading = shape_of(node)[:-1]
    links = []
    for operand in filter(is_tensor, node.all_input_nodes):
        if rank_of(operand) > 1 and _spans(shape_of(operand)[:-1], leading):
            links += broadcast_links(node, operand, trailing=1)
        elif rank_of(operand) > 1 or not operand.meta["val"].is_floating_point():
            return Facts()
    return Facts(tuple(links))


def _spans(axes: Sequence[int], leading: Sequence[int]) -> bool:
    """Whether an operand has all the leading axes of the output, or 1 in their places."""
    return len(axes) == len(leading) and all(
        size in (1, full) for size, full in zip(axes, leading, strict=True)
    )


def modulated(node: fx.Node) -> Facts:
    """Norm, scale and shift of `[B, N, C]`: both are `[1]`, `[C]`, `[B, C]` or `[B, N, C]`.

    Batch and tokens may be 1 there. By frames, `[B, F, 1, C]`, no facts.
    """
    links = same_axes(node, operand_at(node, 0), skip=(-1,)).links
    for operand in filter(is_tensor, operands(node)[1:]):
        shape = shape_of(operand)
        if len(shape) == 2:
            links += (Link(0, operand, 0),) if shape[0] == shape_of(node)[0] else ()
        elif len(shape) == 3:
            links += tuple(broadcast_links(node, operand, trailing=1))
        elif len(shape) > 3:
            return Facts()
    return Facts(links)


def linear(node: fx.Node) -> Facts:
    """All axes but the last of the first operand; weights are shared."""
    return same_axes(node, operand_at(node, 0), skip=(-1,))


def register_rowwise(op: object) -> None:
    """Say that a custom op computes each row of its output from the same rows of its operands.

    Selected steps then call it with the rows that they compute: a norm of `[B, N, C]` or
    `[B, N, H, D]` with `[B, K, C]` or `[B, K, H, D]`. Without this it is right, too, but computed
    whole. Call this before compiling.

    The op returns one tensor and writes to none. A row lies along the last axis. Operands of the
    output's shape but for the last axis go by rows, and share what they have once (`[B, 1, C]`);
    those of one axis are weights, which all rows share. A call with other operands, such as a table
    of rotations `[N, D]`, is computed whole.

    Args:
        op: the op, or its name, such as "my_kernels::rms_norm"; it need not exist yet.

    Raises:
        OptionError: `op` is no op of `torch.ops`.
    """
    BY_NAME[registered_name(op)] = rowwise


for known in KNOWN:
    register_rowwise(known)
BY_NAME.update({MODULATED: modulated, LINEAR: linear})
