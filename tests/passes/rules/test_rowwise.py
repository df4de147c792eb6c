"""Row-wise ops as the stacks call them: selected steps compute selected rows alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import specdiff
from specdiff.passes.graph.dependence import descendants
from specdiff.passes.rules.row_results import row_result
from specdiff.plan import Plan
from tests.helpers import step_counts
from tests.models import changed, randomize
from tests.oracles import Traced, trace
from tests.passes.checks import check_oracles
from tests.passes.rules.stand_ins import TWO, norm, stand_ins, turned
from tests.passes.rules.test_attention_ops import Called, _attend
from tests.passes.toys import CHANNELS, HEADS, TEXT, TOKENS, Toy, toy_inputs

N, D = TEXT + TOKENS, CHANNELS // HEADS
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


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
    """What a selective step computes whole of the latent: it is not kept from step to step."""
    selection, graph = found.analysis.selection, found.analysis.module.graph
    latent = descendants(graph, [n for n in graph.nodes if n.meta.get("source", "") and _moves(n)])
    return [n for n in graph.nodes if n in latent & selection.whole - {*selection.cached}]


def _moves(node: fx.Node) -> bool:
    return "hidden_states" in str(node.meta["source"]) and "encoder" not in node.meta["source"]


def _norms_in_place(q, k, v):
    ones = torch.ones(D)
    flat = q.view(len(q), -1, D), k.view(len(k), -1, D)
    torch.ops.sglang.fused_inplace_qknorm(*flat, ones, ones, head_dim=D)
    return _attend(q, k, v, 0.3, False)


def _norm_into(q, k, v):
    flat = q.reshape(-1, D)
    out = torch.empty_like(flat)
    torch.ops.sgl_kernel.rmsnorm(out, flat, torch.ones(D), 1e-6, False)
    flat = torch.ops.sglang.triton_one_pass_rms_norm_cuda(k.reshape(-1, D), torch.ones(D))
    return _attend(out.view(q.shape), flat.view(k.shape), v, 0.3, False)


def _sum_in_place(q, k, v):
    x, residual = q.reshape(-1, CHANNELS), k.reshape(-1, CHANNELS)
    torch.ops.sgl_kernel.fused_add_rmsnorm(x, residual, torch.ones(CHANNELS), 1e-6)
    return _attend(x.view(q.shape), residual.view(k.shape), v, 0.3, False)


def _two_results(q, k, v):
    x, residual, ones = q.flatten(2), k.flatten(2), torch.ones(CHANNELS)
    by_sample = torch.arange(x.shape[0] * CHANNELS).view(-1, CHANNELS) / 9
    for scale in (by_sample, by_sample[:, None], ones, x / 9):
        x, residual = torch.ops.sglang.fused_scale_residual_norm_scale_shift(
            residual, x, scale / 2, ones, None, scale, scale + 1, "layer"
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
    ones, flat = torch.ones(D), [x.view(-1, HEADS, D) for x in (q, k)]
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
    assert _computed_whole(found) == []


def _own(q, k, v):
    ops, table = torch.ops.tests, TABLE.to(q.dtype)
    ops.norm_(q.view(-1, D), torch.ones(D))
    q, k = ops.turn(q, k, table)
    k = ops.pick(k, torch.arange(N), table.flip(0))
    q = ops.named(q, torch.ones(D))
    return _attend(q, k, v, 0.3, False)


def _norm_(x, w):
    x.copy_(norm(x, w))


def _picked(x, positions, table):
    return turned(x, table[positions][:, None])


OWN: dict[str, tuple[str, Callable[..., Any]]] = {
    "norm_": ("(Tensor(a!) x, Tensor w) -> ()", _norm_),
    "turn": (
        "(Tensor q, Tensor k, Tensor table)" + TWO,
        lambda q, k, table: tuple(turned(x, table[:, None]) for x in (q, k)),
    ),
    "pick": ("(Tensor x, Tensor positions, Tensor table) -> Tensor", _picked),
    "named": ("(Tensor self, Tensor target) -> Tensor", norm),  # as parameters of ours are
    "with_sum": (
        "(Tensor x, Tensor w) -> (Tensor, Tensor)",
        lambda x, w: (norm(x, w), x.sum()[None]),
    ),
}


@pytest.mark.usefixtures("_rowwise_table")
@pytest.mark.parametrize("register", [False, True])
def test_ops_of_ones_own(register):
    """Without `register_rowwise` they are right, and whole."""
    with stand_ins(**OWN):
        if register:
            specdiff.register_rowwise(torch.ops.tests.norm_)
            specdiff.register_rowwise("tests::named")
            specdiff.register_rowwise("tests::turn", tokens=("table",))
            specdiff.register_rowwise("tests::pick", tokens=("positions",), shared=("table",))
        assert bool(_computed_whole(_checked(Called(_own)))) != register


def _unnamed_table(q, k, v):
    return _attend(torch.ops.tests.turn(q, k, TABLE)[0], k, v, 0.3, False)


def _unnamed_positions(q, k, v):
    return _attend(torch.ops.tests.pick(q, torch.arange(N), TABLE), k, v, 0.3, False)


def _fewer_keys(q, k, v):
    one, flat = torch.ones(D), k[:, :, :1].clone()
    torch.ops.sglang.fused_inplace_qknorm(q, flat, one, one)
    return _attend(q, flat.expand(k.shape), v, 0.3, False)


def _written_twice(q, k, v):
    """Both operands are one value: what a kernel makes of that goes by more than rows."""
    one = torch.ones(D)
    torch.ops.sglang.fused_inplace_qknorm(q, q, one, one)
    return _attend(q, k, v, 0.3, False)


def _sum_beside(q, k, v):
    """Nobody uses the result that is no row, but the op makes it."""
    return _attend(torch.ops.tests.with_sum(q, torch.ones(D))[0], k, v, 0.3, False)


def _tokens_before_samples(q, k, v):
    flat = q.transpose(0, 1).reshape(-1, CHANNELS)
    flat = torch.ops.sglang.triton_one_pass_rms_norm_cuda(flat, torch.ones(CHANNELS))
    return _attend(flat.view(N, len(q), HEADS, D).transpose(0, 1), k, v, 0.3, False)


MISFITS = [_unnamed_table, _unnamed_positions, _fewer_keys, _written_twice, _sum_beside]


@pytest.mark.usefixtures("_rowwise_table")
@pytest.mark.parametrize("kernel", MISFITS, ids=lambda kernel: kernel.__name__.strip("_"))
def test_a_call_of_another_kind_is_computed_whole(kernel):
    specdiff.register_rowwise("tests::turn")
    specdiff.register_rowwise("tests::pick")
    specdiff.register_rowwise("tests::with_sum")
    with stand_ins(**OWN):
        assert _computed_whole(_checked(Called(kernel)))


def test_tokens_may_come_before_samples():
    with stand_ins():
        assert not _computed_whole(_checked(Called(_tokens_before_samples)))


def test_a_grid_is_no_split_of_tokens():
    """What comes as [B, H, W, C] has its tokens where the op gets [B, H * W, C]."""

    def middle(self: Toy, x: Tensor) -> Tensor:
        grid = x.view(len(x), 2, -1, CHANNELS).sin().flatten(1, 2)
        norm = torch.ops.sglang.triton_one_pass_rms_norm_cuda(grid, torch.ones(CHANNELS))
        return self.q(norm)

    with stand_ins():
        found = _checked(Toy(middle, text=False))
    (result,) = found.analysis.module.graph.find_nodes(op="call_function", target=row_result)
    assert result not in found.analysis.selection.whole


class Blocks(Called):
    """Blocks whose norms and rotations write into slices of one value, and into the residual."""

    def __init__(self, depth: int = 1, views: str = "chunk") -> None:
        super().__init__()
        self.joint = nn.ModuleList(nn.Linear(CHANNELS, 3 * CHANNELS) for _ in range(depth))
        self.views = views

    def slices(self, qkv: Tensor) -> tuple[Tensor, ...]:
        if self.views == "chunk":
            return tuple(x.unflatten(-1, (HEADS, D)) for x in qkv.chunk(3, -1))
        return qkv.unflatten(-1, (3, HEADS, D)).unbind(2)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor
    ) -> tuple[Tensor]:
        x = self.embed(hidden_states) + timestep.sin()[:, None, None]
        x = torch.cat([self.embed_text(encoder_hidden_states), x], 1)
        residual, one = x.clone(), torch.ones(D)
        for joint in self.joint:
            qkv = joint(x)
            q, k, v = self.slices(qkv)
            flat = [t.view(-1, HEADS, D) for t in (q, k)]
            torch.ops.sglang.fused_inplace_qknorm(*flat, one, one, 1e-5)
            x = self.o(_attend(q, k, v, 0.3, False).flatten(2)) + qkv[..., :CHANNELS]
            flat = [t.view(-1, CHANNELS) for t in (x, residual)]
            torch.ops.sgl_kernel.fused_add_rmsnorm(*flat, torch.ones(CHANNELS), 1e-6)
        return (self.head((x + residual)[:, TEXT:]),)


@pytest.mark.parametrize("views", ["chunk", "unbind"])
def test_slices_of_one_value_are_written_to(views):
    with stand_ins():
        assert not _computed_whole(_checked(Blocks(2, views)))


def test_under_inductor():
    with stand_ins():
        model, inputs = randomize(Blocks(4)), toy_inputs()
        result = specdiff.verify(model, **inputs)
        assert result.passed, result
    kernels = [_two_results, _turned_by_one_table, _joined_into]
    with stand_ins():
        result = specdiff.verify(randomize(Called(*kernels)), **inputs)
        assert result.passed, result


def _generated(model: nn.Module) -> Tensor:
    inputs = toy_inputs(1)
    latent = inputs["hidden_states"]
    for now, then in pairwise(torch.linspace(1, 0, 11)):
        (velocity,) = model(latent, inputs["encoder_hidden_states"], now[None])
        latent = latent + (then - now) * velocity
    return latent


@pytest.mark.parametrize("options", [{"cache_ratio": 0.5}, {}], ids=["tokens", "steps"])
def test_steps_of_a_generation(options):
    """Tokens are selected, or whole steps forecast."""
    with stand_ins(), torch.no_grad():
        model = randomize(Blocks(2))
        dense = _generated(model)
        given = {"plan": Plan.every(4, warmup=2), "inner_backend": "eager", **options}
        model.compile(backend=specdiff.backend(**given))
        drawn = _generated(model)
    assert step_counts(model) == ((4, 6, 0) if options else (4, 0, 6))
    assert 0 < (drawn - dense).norm() < 0.1 * dense.norm()
