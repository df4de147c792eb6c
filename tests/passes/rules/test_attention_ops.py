"""Attention as the stacks call it: ops of the table, by stand-ins of the same name and schema."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import specdiff
from specdiff.errors import OptionError, Unsupported
from specdiff.passes.rules import attention_ops
from specdiff.passes.rules.attention import ATTENTION, OWN_CALL
from specdiff.passes.rules.attention_ops import AXES
from tests.models import changed, randomize
from tests.oracles import trace
from tests.passes.checks import check_oracles
from tests.passes.toys import BATCH, TEXT, TOKENS, Toy, toy_inputs

N = TEXT + TOKENS
aten = torch.ops.aten
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]

SCHEMAS = {
    "flash_attn::_flash_attn_forward": (
        "Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, "
        "SymInt window_size_left, SymInt window_size_right, float softcap, Tensor? alibi_slopes, "
        "bool return_softmax"
    ),
    "flash_attn::_flash_attn_varlen_forward": (
        "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
        "SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, float softmax_scale, "
        "bool causal, SymInt window_size_left=-1, SymInt window_size_right=-1, float softcap=0.0, "
        "Tensor? alibi_slopes=None, bool return_softmax=False, Tensor? block_table=None"
    ),
    "flash_attn_3::_flash_attn_forward": (
        "Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, Tensor? qv=None, "
        "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, float? softmax_scale=None, "
        "bool causal=False, SymInt window_size_left=-1, SymInt window_size_right=-1, "
        "SymInt attention_chunk=0, float softcap=0.0, SymInt num_splits=1, bool? pack_gqa=None"
    ),
    "_diffusers_flash_attn_3::_flash_attn_forward": (
        "Tensor q, Tensor k, Tensor v, float? softmax_scale=None, bool causal=False, "
        "Tensor? qv=None, SymInt attention_chunk=0, float softcap=0.0, SymInt num_splits=1, "
        "bool? pack_gqa=None, bool deterministic=False, SymInt sm_margin=0"
    ),
    "sglang::flash_attn_varlen_func_op": (
        "Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
        "SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, Tensor? seqused_q=None, "
        "float? softmax_scale=None, bool causal=False, int[]? window_size=None, "
        "float softcap=0.0, SymInt num_splits=1, bool return_softmax_lse=False, SymInt ver=4"
    ),
    "vllm_omni::sageattn3_blackwell": "Tensor query, Tensor key, Tensor value, bool is_causal",
    "xfuser::flydsl_attn": "Tensor query, Tensor key, Tensor value, bool is_causal",
    "my_kernels::sageattn": (
        'Tensor q, Tensor k, Tensor v, str tensor_layout="HND", bool is_causal=False, '
        "float? sm_scale=None, bool return_lse=False"
    ),
    "my_kernels::single_prefill": (
        "Tensor q, Tensor k, Tensor v, Tensor? custom_mask=None, bool causal=False, "
        'str kv_layout="NHD", str pos_encoding_mode="NONE", float? sm_scale=None, '
        "SymInt window_left=-1, float? logits_soft_cap=None"
    ),
    "tests::my_attention": "Tensor a, Tensor b, Tensor c, str kind, float scale",
}
PAIRS = ("flash_attn::", "flash_attn_3::", "_diffusers_flash_attn_3::")
"""These return their output and its log-sum-exp."""


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> Tensor:
    """[B, N, H, D] by torch."""
    heads = (each.transpose(1, 2) for each in (q, k, v))
    out = F.scaled_dot_product_attention(*heads, is_causal=causal, scale=scale)
    return out.transpose(1, 2).contiguous()


def _stand_in(name: str) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    def kernel(q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> object:
        # in the dispatcher every argument that is not the default comes by position
        schema = torch._C._get_schema(name, "")
        given = dict(zip((a.name for a in schema.arguments[3:]), args, strict=False)) | kwargs
        scale = given.get("softmax_scale", given.get("sm_scale", given.get("scale")))
        causal = bool(given.get("causal", given.get("is_causal", False)))
        starts = given.get("cu_seqlens_q")
        if q.dim() == 3:
            samples = 1 if starts is None else len(starts) - 1
            if starts is not None:
                assert q.device.type == "meta" or starts.tolist()[-1] == len(q)
            packed = (each.unflatten(0, (samples, -1)) for each in (q, k, v))
            out = _attend(*packed, scale, causal).flatten(0, 1)
        elif attention_ops.AXES.get(name) == "BHND":
            out = _attend(*(each.transpose(1, 2) for each in (q, k, v)), scale, causal).transpose(
                1, 2
            )
            out = out.contiguous()
        else:
            out = _attend(q, k, v, scale, causal)
        return (out, out.new_zeros(1)) if name.startswith(PAIRS) else out

    return kernel


@contextmanager
def stand_in(name: str) -> Iterator[None]:
    """In here the op exists, computed by torch."""
    namespace, leaf = name.split("::")
    returns = "(Tensor, Tensor)" if name.startswith(PAIRS) else "Tensor"
    with torch.library._scoped_library(namespace, "FRAGMENT") as library:
        if hasattr(getattr(torch.ops, namespace), leaf):  # diffusers defines its own
            library.impl(leaf, _stand_in(name), "CPU")
        else:
            library.define(f"{leaf}({SCHEMAS[name]}) -> {returns}")
            library.impl(leaf, _stand_in(name), "CompositeExplicitAutograd")
        yield


def _flash_2(q, k, v):
    op = torch.ops.flash_attn._flash_attn_forward
    return op(q, k, v, 0.0, 0.3, False, -1, -1, 0.0, None, False)[0]


def _varlen(q, k, v):
    starts = torch.arange(0, (BATCH + 1) * N, N, dtype=torch.int32)
    flat = (each.flatten(0, 1) for each in (q, k, v))
    op = torch.ops.flash_attn._flash_attn_varlen_forward
    out, _ = op(*flat, starts, starts, N, N, 0.0, 0.3, False)
    return out.unflatten(0, (BATCH, N))


def _swapped(op: Callable[..., Tensor]) -> Kernel:
    def call(q, k, v):
        return op(*(each.transpose(1, 2).contiguous() for each in (q, k, v))).transpose(1, 2)

    return call


def _by_name(name: str, *args: object, **kwargs: object) -> Callable[..., object]:
    namespace, leaf = name.split("::")

    def call(q, k, v):
        return getattr(getattr(torch.ops, namespace), leaf)(q, k, v, *args, **kwargs)

    return call


def _first(op: Callable[..., object]) -> Kernel:
    return lambda q, k, v: op(q, k, v)[0]


def _flat(op: Callable[..., Tensor]) -> Kernel:
    """Of one sample."""
    return lambda q, k, v: op(q.squeeze(0), k[0], v.view(v.shape[1:])).unsqueeze(0)


CALLS: dict[str, Kernel] = {
    "flash_attn::_flash_attn_forward": _flash_2,
    "flash_attn::_flash_attn_varlen_forward": _varlen,
    "flash_attn_3::_flash_attn_forward": _first(
        _by_name("flash_attn_3::_flash_attn_forward", softmax_scale=0.3)
    ),
    "_diffusers_flash_attn_3::_flash_attn_forward": _first(
        _by_name("_diffusers_flash_attn_3::_flash_attn_forward", 0.3, False)
    ),
    "sglang::flash_attn_varlen_func_op": _by_name(
        "sglang::flash_attn_varlen_func_op",
        max_seqlen_q=N,
        max_seqlen_k=N,
        softmax_scale=0.3,
        window_size=[-1, -1],
    ),
    "vllm_omni::sageattn3_blackwell": _swapped(_by_name("vllm_omni::sageattn3_blackwell", False)),
    "xfuser::flydsl_attn": _by_name("xfuser::flydsl_attn", False),
    "my_kernels::sageattn": _swapped(_by_name("my_kernels::sageattn", sm_scale=0.3)),
}


class Called(Toy):
    """A toy with one attention for each kernel, each called on [B, N, H, D]."""

    def __init__(self, *kernels: Kernel) -> None:
        super().__init__(lambda self, x: x)
        self.kernels = kernels

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor
    ) -> tuple[Tensor]:
        x = self.embed(hidden_states) + timestep.sin()[:, None, None]
        joint = torch.cat([self.embed_text(encoder_hidden_states), x], 1)
        for kernel in self.kernels:
            y = self.norm(joint)
            q, k, v = (self.heads(linear(y)).transpose(1, 2) for linear in (self.q, self.k, self.v))
            joint = joint + self.o(kernel(q, k, v).flatten(2))
        return (self.head(joint[:, TEXT:]),)


def _check(kernels: Iterable[Kernel], batch: int = BATCH) -> list[bool]:
    """Hold a model to the oracles; for each attention, whether its own op computes it."""
    model, inputs = randomize(Called(*kernels)), toy_inputs(batch)
    found = trace(model, inputs, changed(inputs))
    check_oracles(model, (inputs, changed(inputs)), found)
    nodes = found.analysis.module.graph.find_nodes(op="call_function", target=ATTENTION)
    return [OWN_CALL in node.meta for node in nodes]


@pytest.fixture
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(attention_ops, "AXES", dict(AXES))
    monkeypatch.setattr(attention_ops, "_IGNORED_BY", {})


@pytest.mark.usefixtures("_table")
def test_selected_steps_call_the_op_itself():
    """Of SageAttention and flashinfer, which are no ops, users register their own wrappers."""
    specdiff.register_attention("my_kernels::sageattn", "BHND")
    specdiff.register_attention("my_kernels::single_prefill", "BNHD")
    with ExitStack() as ops:
        for name in CALLS:
            ops.enter_context(stand_in(name))
        assert all(_check(CALLS.values()))
    flat = "my_kernels::single_prefill"
    with stand_in(flat):
        assert all(_check([_flat(_by_name(flat, sm_scale=0.3))], batch=1))


def _private(name: str, *args: object, **kwargs: object) -> Kernel:
    op = getattr(aten, name)

    def call(q, k, v):
        return op(*(each.transpose(1, 2) for each in (q, k, v)), *args, **kwargs)[0].transpose(1, 2)

    return call


BIAS = torch.arange(N * N).view(1, 1, N, N) * 7 % 11 / 5 - 1
CUDA_ONLY = {
    "_scaled_dot_product_flash_attention": (0.0, False),
    "_scaled_dot_product_efficient_attention": (None, True),
    "_scaled_dot_product_cudnn_attention": (None, False),
}


def test_private_forms_of_torch():
    """A mask or causality goes by position, so these become torch's public form."""
    cpu = "_scaled_dot_product_flash_attention_for_cpu"

    def kernel(name):
        def on_cpu(q, k, v, *args, scale=None):
            out = getattr(aten, cpu)(q, k, v, scale=scale)
            results = getattr(aten, name).default._schema.returns
            rest = [0 if str(r.type) == "int" else q.new_zeros(1) for r in results[2:]]
            return (*out, *rest)

        return on_cpu

    with torch.library._scoped_library("aten", "IMPL") as library:
        for name in CUDA_ONLY:
            library.impl(name, kernel(name), "CPU")
        kernels = [_private(name, *args, scale=0.3) for name, args in CUDA_ONLY.items()]
        kernels += [
            _private(cpu, scale=0.3),
            _private(cpu, 0.0, True),
            _private(cpu, attn_mask=BIAS),
        ]
        assert _check(kernels) == [True, True, True, True, False, False]


def _reason(kernel: Kernel) -> str:
    with pytest.raises((Unsupported, torch._dynamo.exc.BackendCompilerFailed)) as raised:
        trace(randomize(Called(kernel)), toy_inputs())
    return str(raised.value)


@pytest.mark.usefixtures("_table")
def test_an_op_of_ones_own_is_registered():
    name = "tests::my_attention"
    kernel = _by_name(name, "fast", 0.3)
    with stand_in(name):
        assert f"if one of {name} is an attention, say so" in _reason(kernel)
        specdiff.register_attention(torch.ops.tests.my_attention, "BNHD")
        assert "because of its argument kind=fast" in _reason(kernel)
        specdiff.register_attention(name, "BNHD", ignored=("kind",))
        assert _check([kernel]) == [True]


def test_what_cannot_be_registered():
    with pytest.raises(OptionError, match='must be "BHND" or "BNHD"'):
        specdiff.register_attention("my::attention", "NHD")
    for op in ("attention", torch.relu, "a::b::c"):
        with pytest.raises(OptionError, match=r"must be an op of torch\.ops"):
            specdiff.register_attention(op, "BHND")
        with pytest.raises(OptionError, match=r"must be an op of torch\.ops"):
            specdiff.register_rowwise(op)


FLASH_3 = "flash_attn_3::_flash_attn_forward"


def _unequal(q, k, v):
    starts = torch.tensor([0, N + 1, 2 * N], dtype=torch.int32)
    op = torch.ops.flash_attn._flash_attn_varlen_forward
    flat = (each.flatten(0, 1) for each in (q, k, v))
    return op(*flat, starts, starts, N, N, 0.0, 0.3, False)[0].unflatten(0, (BATCH, N))


def _both_results(q, k, v):
    out, sums = _by_name(FLASH_3)(q, k, v)
    return out * sums.exp()


@pytest.mark.parametrize(
    ("name", "kernel", "reason"),
    [
        (FLASH_3, _first(_by_name(FLASH_3, window_size_left=4)), "its argument window_size_left=4"),
        (FLASH_3, _first(_by_name(FLASH_3, softcap=9.0)), "its argument softcap=9.0"),
        (FLASH_3, _both_results, "uses what it returns beside its output"),
        ("flash_attn::_flash_attn_varlen_forward", _unequal, "samples are equally long"),
    ],
    ids=["window", "softcap", "log-sum-exp", "samples of several lengths"],
)
def test_what_is_another_function_stays_as_it_is(name, kernel, reason):
    with stand_in(name):
        said = _reason(kernel)
        assert f"{name} is not taken for one, because" in said
        assert reason in said


def test_flex_attention_gets_the_step_plan_with_a_reason():
    def flex(q, k, v):
        heads = (each.transpose(1, 2) for each in (q, k, v))
        return flex_attention(*heads, lambda score, b, h, i, j: score * 0.5).transpose(1, 2)

    assert "flex attention" in _reason(flex)


def test_under_inductor():
    name = "flash_attn::_flash_attn_forward"
    with stand_in(name):
        model, inputs = randomize(Called(_flash_2)), toy_inputs()
        result = specdiff.verify(model, **inputs)
        assert result.passed, result
