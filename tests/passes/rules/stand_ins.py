"""Stand-ins of SGLang's row-wise ops: the same names and schemas, computed by torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F


def norm(x, weight, eps=1e-6):
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _out(output, input, weight, eps, enable_pdl):
    output.copy_(norm(input, weight, eps))


def _add(input, residual, weight, eps, enable_pdl=False):
    residual.add_(input)
    input.copy_(norm(residual, weight, eps))


def _pair(q, k, q_weight, k_weight, eps=1e-6, *, head_dim=0):
    q.copy_(norm(q, q_weight, eps))
    k.copy_(norm(k, k_weight, eps))


def _modulated(x, weight, bias, scale, shift, norm_type, eps=1e-5):
    aligned = [m[:, None] if m.dim() == 2 else m for m in (scale, shift)]
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps) * (1 + aligned[0]) + aligned[1]


def _residual(residual, x, gate, weight, bias, scale, shift, norm_type, eps=1e-5):
    total = residual + x * (gate[:, None] if gate.dim() == 2 else gate)
    return _modulated(total, weight, bias, scale, shift, norm_type, eps), total


def turned(x, table):
    """[..., D] by half-width cosines and sines [..., D], which come one after the other."""
    cos, sin = table.chunk(2, -1)
    one, two = x.chunk(2, -1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)


def _by_positions(positions, query, key, head_size, cos_sin_cache, is_neox=True):
    for x in (query, key):
        heads = x.view(len(x), -1, head_size)
        x.copy_(turned(heads, cos_sin_cache[positions][:, None]).view(x.shape))


def _norm_and_turn(q, k, q_weight, k_weight, cos_sin_cache, positions, *, is_neox, eps=1e-6):
    for x, weight in ((q, q_weight), (k, k_weight)):
        x.copy_(turned(norm(x, weight, eps), cos_sin_cache[positions][:, None]))


def _half(x, cos, sin):
    rows = x.shape[0] * x.shape[1]
    cos, sin = (t.reshape(rows, 1, -1)[..., : x.shape[-1] // 2] for t in (cos, sin))
    return turned(x.flatten(0, 1), torch.cat([cos, sin], -1)).view(x.shape)


def _complex(x, rope):
    assert rope.shape[0] == x.shape[1]
    return x * torch.view_as_real(rope).flatten(-2)[:, None]


def _join(attn, mlp, output):
    output.copy_(torch.cat([attn, F.gelu(mlp)], -1))


def _freqs(q, k, freqs):
    for x in (q, k):
        x.mul_(freqs[..., None, : x.shape[-1]])


TWO = " -> (Tensor, Tensor)"
OPS: dict[str, tuple[str, Callable[..., Any]]] = {
    "sglang::triton_one_pass_rms_norm_cuda": (
        "(Tensor x, Tensor w, float eps=1e-06) -> Tensor",
        lambda x, w, eps=1e-6: norm(x, w, eps),
    ),
    "sglang::rmsnorm_scale_shift_per_token_cuda": (
        "(Tensor x, Tensor weight, Tensor scale, Tensor shift, float eps) -> Tensor",
        lambda x, w, scale, shift, eps: norm(x, w, eps) * (1 + scale) + shift,
    ),
    "sglang::diffusion_fused_linear_gelu_tanh": (
        "(Tensor x, Tensor weight, Tensor bias) -> Tensor",
        lambda x, weight, bias: F.gelu(F.linear(x, weight, bias), approximate="tanh"),
    ),
    "sglang::fused_norm_scale_shift": (
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor scale, Tensor shift, str norm_type,"
        " float eps=1e-05) -> Tensor",
        _modulated,
    ),
    "sglang::fused_scale_residual_norm_scale_shift": (
        "(Tensor residual, Tensor x, Tensor? gate, Tensor? weight, Tensor? bias, Tensor scale,"
        " Tensor shift, str norm_type, float eps=1e-05)" + TWO,
        _residual,
    ),
    "sglang::fused_inplace_qknorm": (
        "(Tensor(a!) q, Tensor(b!) k, Tensor q_weight, Tensor k_weight, float eps=1e-06, *,"
        " SymInt head_dim=0) -> ()",
        _pair,
    ),
    "sgl_kernel::rmsnorm": (
        "(Tensor(a!) output, Tensor input, Tensor weight, float eps, bool enable_pdl) -> ()",
        _out,
    ),
    "sgl_kernel::fused_add_rmsnorm": (
        "(Tensor(a!) input, Tensor(b!) residual, Tensor weight, float eps,"
        " bool enable_pdl=False) -> ()",
        _add,
    ),
    "sglang::_gelu_tanh_cat": (
        "(Tensor attn, Tensor mlp, Tensor(a!) output) -> ()",
        _join,
    ),
    "sglang::flashinfer_apply_rope_with_cos_sin_cache_inplace": (
        "(Tensor positions, Tensor(a!) query, Tensor(b!) key, SymInt head_size,"
        " Tensor cos_sin_cache, bool is_neox=True) -> ()",
        _by_positions,
    ),
    "sglang::fused_inplace_qknorm_rope": (
        "(Tensor(a!) q, Tensor(b!) k, Tensor q_weight, Tensor k_weight, Tensor cos_sin_cache,"
        " Tensor positions, *, bool is_neox, float eps=1e-06) -> ()",
        _norm_and_turn,
    ),
    "sglang::triton_fused_rope_rotate_half_bitexact": (
        "(Tensor x, Tensor cos, Tensor sin) -> Tensor",
        _half,
    ),
    "sglang::fused_complex_rope": ("(Tensor x, Tensor rope) -> Tensor", _complex),
    "sglang::fused_inplace_helios_qk_rope": (
        "(Tensor(a!) q, Tensor(b!) k, Tensor freqs) -> ()",
        _freqs,
    ),
}


@contextmanager
def stand_ins(**more: tuple[str, Callable[..., Any]]) -> Iterator[None]:
    """In here the ops exist, and those of `tests` that are given, computed by torch."""
    libraries: list[torch.library.Library] = []
    given = {f"tests::{name}": op for name, op in more.items()}
    for name, (schema, function) in {**OPS, **given}.items():
        namespace, short = name.split("::")
        library = torch.library.Library(namespace, "FRAGMENT")
        library.define(short + schema)
        library.impl(short, function, "CompositeExplicitAutograd")
        writes = schema.endswith("-> ()")
        library.impl(short, (lambda *_, **__: None) if writes else function, "Meta")
        libraries.append(library)
    try:
        yield
    finally:
        for library in libraries:
            library._destroy()
