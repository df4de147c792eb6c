"""The table of row-wise custom ops, such as norms and rotations, and what their operands are.

A row lies along the last axis. Each row of what such an op returns, or writes to an operand, is
computed from the same rows of its operands. `specdiff.passes.normalize.read_rowwise` finds them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from specdiff.passes.rules.registry import registered_name


@dataclass(frozen=True)
class RowOperands:
    """The operands of an op that do not simply go by rows, by their names."""

    tokens: frozenset[str] = frozenset()
    """One row for each token: `[N, ...]`, `[B, N, ...]` or `[B * N, ...]`."""
    shared: frozenset[str] = frozenset()
    """All rows may read any of it."""
    samples: frozenset[str] = frozenset()
    """Those of two axes have one row for each sample, or for all."""


def _operands(
    tokens: Collection[str] = (), shared: Collection[str] = (), samples: Collection[str] = ()
) -> RowOperands:
    return RowOperands(frozenset(tokens), frozenset(shared), frozenset(samples))


_BY_POSITIONS = _operands(tokens=("positions",), shared=("cos_sin_cache",))
_ROTATED = _operands(tokens=("cos", "sin"))
ROWWISE: dict[str, RowOperands] = {
    "vllm_ir::rms_norm": RowOperands(),
    "xfuser::aiter_rms_norm": RowOperands(),
    "sgl_kernel::rmsnorm": RowOperands(),
    "sgl_kernel::fused_add_rmsnorm": RowOperands(),
    "sglang::_gelu_tanh_cat": RowOperands(),
    "sglang::diffusion_fused_linear_gelu_tanh": _operands(shared=("weight",)),
    "sglang::flashinfer_apply_rope_with_cos_sin_cache_inplace": _BY_POSITIONS,
    "sglang::fused_complex_rope": _operands(tokens=("rope",)),
    "sglang::fused_inplace_helios_qk_rope": _operands(tokens=("freqs",)),
    "sglang::fused_inplace_qknorm": RowOperands(),
    "sglang::fused_inplace_qknorm_rope": _BY_POSITIONS,
    "sglang::fused_norm_scale_shift": _operands(samples=("scale", "shift")),
    "sglang::fused_qknorm_rope_out_of_place": _BY_POSITIONS,
    "sglang::fused_scale_residual_norm_scale_shift": _operands(samples=("gate", "scale", "shift")),
    "sglang::qknorm_complex_rope": _operands(tokens=("rope",)),
    "sglang::qknorm_complex_rope_cuda": _operands(tokens=("rope",)),
    "sglang::rmsnorm_cast_before_weight_bitexact": RowOperands(),
    "sglang::rmsnorm_cast_before_weight_rope_bitexact": _ROTATED,
    "sglang::rmsnorm_scale_shift_per_token_cuda": RowOperands(),
    "sglang::triton_fused_rmsnorm_scale_shift_bitexact": RowOperands(),
    "sglang::triton_fused_rope_rotate_half_bitexact": _ROTATED,
    "sglang::triton_fused_scale_residual_rmsnorm_scale_shift_bitexact": RowOperands(),
    "sglang::triton_one_pass_rms_norm_cuda": RowOperands(),
}
"""By the name of the op. `register_rowwise` adds to it."""


def register_rowwise(
    op: object, *, tokens: Collection[str] = (), shared: Collection[str] = ()
) -> None:
    """Say that a custom op computes each row of its results from the same rows of its operands.

    Selected steps then call it with the rows that they compute: a norm of `[B, N, C]` or
    `[B, N, H, D]` with `[B, K, C]` or `[B, K, H, D]`. Without this it is right, too, but computed
    whole. Call this before compiling.

    A row lies along the last axis. Results are what the op returns, one tensor or several, and the
    operands that it writes to, as its schema says; all have the same axes but the last. They may
    come merged, as `[B * N, C]` or `[B, N * H, D]`, if the model makes them so by a view. Operands
    of these axes go by rows, and share what they have once (`[B, 1, C]`); those of one axis are
    weights, which all rows share. Others are named:

        specdiff.register_rowwise("my_kernels::qk_norm_")  # writes to q and k
        specdiff.register_rowwise("my_kernels::rotate", tokens=("cos", "sin"))
        specdiff.register_rowwise("my_kernels::rotate_", tokens=("positions",), shared=("table",))

    A call with other operands is computed whole.

    Args:
        op: the op, or its name, such as "my_kernels::rms_norm"; it need not exist yet.
        tokens: names of operands with a row for each token, such as a table of rotations: `[N, D]`,
            `[B, N, D]` or `[B * N, D]`, or positions `[N]`, where the tokens of results are the
            axis behind the samples. Where samples share `[N, D]`, the op gets them as one,
            `[1, B * K, ...]`.
        shared: names of operands that any row may read all of, such as a table that positions pick
            from, or a matrix of weights.

    Raises:
        OptionError: `op` is no op of `torch.ops`.
    """
    ROWWISE[registered_name(op)] = _operands(tokens, shared)
