"""Row-wise ops as the stacks call them, by stand-ins of the same name and schema."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from specdiff.passes.rules import rowwise
from specdiff.passes.rules.rowwise import ROWWISE
from tests.models import changed, randomize
from tests.oracles import Traced, trace
from tests.passes.checks import check_oracles
from tests.passes.rules.test_attention_ops import Called, _attend
from tests.passes.toys import CHANNELS, HEADS, TEXT, TOKENS, toy_inputs

N, D = TEXT + TOKENS, CHANNELS // HEADS
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def _norm(x, weight, eps=1e-6):
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _out(output, input, weight, eps, enable_pdl):
    output.copy_(_norm(input, weight, eps))


def _add(input, residual, weight, eps, enable_pdl=False):
    residual.add_(input)
    input.copy_(_norm(residual, weight, eps))


def _pair(q, k, q_weight, k_weight, eps=1e-6, *, head_dim=0):
    q.copy_(_norm(q, q_weight, eps))
    k.copy_(_norm(k, k_weight, eps))


def _modulated(x, weight, bias, scale, shift, norm_type, eps=1e-5):
    aligned = [m[:, None] if m.dim() == 2 else m for m in (scale, shift)]
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps) * (1 + aligned[0]) + aligned[1]


def _residual(residual, x, gate, weight, bias, scale, shift, norm_type, eps=1e-5):
    total = residual + x * (gate[:, None] if gate.dim() == 2 else gate)
    return _modulated(total, weight, bias, scale, shift, norm_type, eps), total


def _turned(x, table):
    """[..., D] by half-width cosines and sines [..., D], which come one after the other."""
    cos, sin = table.chunk(2, -1)
    one, two = x.chunk(2, -1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)


def _by_positions(positions, query, key, head_size, cos_sin_cache, is_neox=True):
    for x in (query, key):
        heads = x.view(len(x), -1, head_size)
        x.copy_(_turned(heads, cos_sin_cache[positions][:, None]).view(x.shape))


def _norm_and_turn(q, k, q_weight, k_weight, cos_sin_cache, positions, *, is_neox, eps=1e-6):
    for x, weight in ((q, q_weight), (k, k_weight)):
        x.copy_(_turned(_norm(x, weight, eps), cos_sin_cache[positions][:, None]))


def _half(x, cos, sin):
    rows = x.shape[0] * x.shape[1]
    cos, sin = (t.reshape(rows, 1, -1)[..., : x.shape[-1] // 2] for t in (cos, sin))
    return _turned(x.flatten(0, 1), torch.cat([cos, sin], -1)).view(x.shape)


def _complex(x, rope):
    assert rope.shape[0] == x.shape[1]
    return x * torch.view_as_real(rope).flatten(-2)[:, None]


def _freqs(q, k, freqs):
    for x in (q, k):
        x.mul_(freqs[..., None, : x.shape[-1]])


TWO = " -> (Tensor, Tensor)"
OPS: dict[str, tuple[str, Callable[..., Any]]] = {
    "sglang::triton_one_pass_rms_norm_cuda": (
        "(Tensor x, Tensor w, float eps=1e-06) -> Tensor",
        lambda x, w, eps=1e-6: _norm(x, w, eps),
    ),
    "sglang::rmsnorm_scale_shift_per_token_cuda": (
        "(Tensor x, Tensor weight, Tensor scale, Tensor shift, float eps) -> Tensor",
        lambda x, w, scale, shift, eps: _norm(x, w, eps) * (1 + scale) + shift,
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
        lambda attn, mlp, output: output.copy_(torch.cat([attn, F.gelu(mlp)], -1)) and None,
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


@pytest.fixture
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(rowwise, "ROWWISE", dict(ROWWISE))
    monkeypatch.setattr("specdiff.passes.normalize.read_rowwise.ROWWISE", rowwise.ROWWISE)


def _checked(model: nn.Module, batch: int = 2) -> Traced:
    """A model that is held to the oracles, and whose dense run is the untouched one to the bit."""
    model, inputs = randomize(model), toy_inputs(batch)
    found = trace(model, inputs, changed(inputs))
    check_oracles(model, (inputs, changed(inputs)), found)
    programs = found.programs()
    with torch.no_grad():
        (drawn,) = programs.tail(found.flat[0], programs.probe(found.flat[0]))
        assert torch.equal(drawn, model(**inputs)[0])
    return found


def _computed_whole(found: Traced) -> list[fx.Node]:
    """Values with tokens that a selective step computes whole: it does not keep them."""
    selection = found.analysis.selection
    whole = (n for n in selection.whole if n.op == "call_function" and selection.carries(n))
    return [n for n in whole if n not in selection.cached]


def _norms_in_place(q, k, v):
    ones = q.new_ones(D)
    flat = q.view(len(q), -1, D), k.view(len(k), -1, D)
    torch.ops.sglang.fused_inplace_qknorm(*flat, ones, ones, head_dim=D)
    return _attend(q, k, v, 0.3, False)


def _norm_into(q, k, v):
    flat = q.reshape(-1, D)
    out = torch.empty_like(flat)
    torch.ops.sgl_kernel.rmsnorm(out, flat, q.new_ones(D), 1e-6, False)
    flat = torch.ops.sglang.triton_one_pass_rms_norm_cuda(k.reshape(-1, D), q.new_ones(D))
    return _attend(out.view(q.shape), flat.view(k.shape), v, 0.3, False)


def _sum_in_place(q, k, v):
    x, residual = q.reshape(-1, CHANNELS), k.reshape(-1, CHANNELS)
    torch.ops.sgl_kernel.fused_add_rmsnorm(x, residual, q.new_ones(CHANNELS), 1e-6)
    return _attend(x.view(q.shape), residual.view(k.shape), v, 0.3, False)


def _two_results(q, k, v):
    x, residual, ones = q.flatten(2), k.flatten(2), q.new_ones(CHANNELS)
    by_sample = torch.arange(x.shape[0] * CHANNELS).view(-1, CHANNELS) / 9
    for scale in (by_sample, by_sample[:, None], ones, x / 9):
        x, residual = torch.ops.sglang.fused_scale_residual_norm_scale_shift(
            residual, x, scale, ones, None, scale, scale + 1, "layer"
        )
    return _attend(x.view(q.shape), residual.view(k.shape), v, 0.3, False)


def _joined_into(q, k, v):
    x, y = q.flatten(2), k.flatten(2)
    out = torch.empty((*x.shape[:-1], 2 * CHANNELS))
    torch.ops.sglang._gelu_tanh_cat(x, y, out)
    return _attend(out[..., CHANNELS:].view(q.shape), k, v, 0.3, False)


def _one_result(q, k, v):
    """What SGLang's FLUX, SD3, Qwen-Image and Wan call, one after another."""
    ops, x, c = torch.ops.sglang, q.flatten(2), CHANNELS
    ones, by_sample = torch.ones(c), torch.arange(len(q) * c).view(-1, c) / c
    for scale in (by_sample, by_sample[:, None], x / 9, torch.ones(1), ones):
        x = ops.fused_norm_scale_shift(x, ones, None, scale, scale + 1, "layer")
    x = ops.rmsnorm_scale_shift_per_token_cuda(x, ones, x / 3, x / 9, 1e-6)
    x = ops.diffusion_fused_linear_gelu_tanh(x, torch.eye(c), torch.zeros(c))
    q = ops.triton_one_pass_rms_norm_cuda(x.view_as(q), torch.ones(D))
    return _attend(q, k, v, 0.3, False)


TABLE = torch.arange(N * D).view(N, D) / 7 % 3


def _positions(q):
    return torch.arange(N).repeat(len(q)) if len(q) > 1 else torch.arange(N)


def _turned_in_place(q, k, v):
    q2, k2 = (x.reshape(-1, CHANNELS).contiguous() for x in (q, k))
    torch.ops.sglang.flashinfer_apply_rope_with_cos_sin_cache_inplace(
        positions=_positions(q), query=q2, key=k2, head_size=D, cos_sin_cache=TABLE, is_neox=True
    )
    return _attend(q2.view(q.shape), k2.view(k.shape), v, 0.3, False)


def _normed_and_turned_in_place(q, k, v):
    ones, flat = q.new_ones(D), [x.view(-1, HEADS, D) for x in (q, k)]
    torch.ops.sglang.fused_inplace_qknorm_rope(
        *flat, ones, ones, TABLE, _positions(q), is_neox=True
    )
    return _attend(q, k, v, 0.3, False)


def _turned_by_rows(q, k, v):
    op = torch.ops.sglang.triton_fused_rope_rotate_half_bitexact
    flat, wide = TABLE.repeat(len(q), 1), TABLE.expand(len(q), N, D)[:, :, None]
    return _attend(op(q, flat, flat + 1), op(k, wide, wide + 1), v, 0.3, False)


def _turned_by_one_table(q, k, v):
    """Active tokens differ between samples, so that each needs rows of the table of its own."""
    rope = torch.view_as_complex(TABLE.view(N, -1, 2))
    q, k = torch.ops.sglang.fused_complex_rope(q, rope), k.clone()
    torch.ops.sglang.fused_inplace_helios_qk_rope(k, v, TABLE.expand(len(v), N, D))
    return _attend(q, k, v, 0.3, False)


KERNELS: list[Kernel] = [
    _norms_in_place,
    _norm_into,
    _sum_in_place,
    _two_results,
    _joined_into,
    _one_result,
    _turned_in_place,
    _normed_and_turned_in_place,
    _turned_by_rows,
    _turned_by_one_table,
]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__.strip("_"))
def test_selected_rows_alone_are_computed(kernel, batch):
    with stand_ins():
        found = _checked(Called(kernel), batch)
    tables = {"reshape", "expand", "view", "repeat"}  # of positions, which no model computes
    left = [n for n in _computed_whole(found) if n.target.__name__.split(".")[0] not in tables]
    assert left == []
