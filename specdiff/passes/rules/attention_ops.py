"""The table of attention ops: kernels that compute what `scaled_dot_product_attention` does.

    axes    query               key, value      an example
    BHND    [B, H, L, E]        [B, H, S, E]    aten::_scaled_dot_product_flash_attention
    BNHD    [B, L, H, E]        [B, S, H, E]    flash_attn::_flash_attn_forward
    BNHD    [tokens, H, E], all samples one     flash_attn::_flash_attn_varlen_forward
            after another, and so key, value

What the arguments mean is read off the schema: the first three tensors are query, key and value,
the others go by usual names. An argument that is neither known nor idle, such as a window, makes
the call another function: it is not taken for attention, and stays as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from specdiff import torch_adapter
from specdiff.errors import OptionError
from specdiff.passes.rules.registry import is_tensor, rank_of, registered_name, shape_of

Axes = Literal["BHND", "BNHD"]
AXES: dict[str, Axes] = {
    "aten::_scaled_dot_product_flash_attention": "BHND",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "BHND",
    "aten::_scaled_dot_product_efficient_attention": "BHND",
    "aten::_scaled_dot_product_cudnn_attention": "BHND",
    "aten::_scaled_dot_product_fused_attention_overrideable": "BHND",
    "aten::_flash_attention_forward": "BNHD",
    "aten::_efficient_attention_forward": "BNHD",
    "flash_attn::_flash_attn_forward": "BNHD",
    "flash_attn::_flash_attn_varlen_forward": "BNHD",
    "flash_attn_3::_flash_attn_forward": "BNHD",
    "_diffusers_flash_attn_3::_flash_attn_forward": "BNHD",
    "fastvideo::_flash_attn_default_forward": "BNHD",
    "sglang::flash_attn_varlen_func_op": "BNHD",
    "sglang::flash_attn_varlen_func_op_lse": "BNHD",
    "vllm_omni::sageattn3_blackwell": "BHND",
    "xfuser::flydsl_attn": "BNHD",
    "xfuser::flydsl_attn_fp8": "BNHD",
    "xfuser::aiter_fp8_dense_attention": "BNHD",
    "xfuser::aiter_fp8_varlen_attention": "BNHD",
}
"""The order of axes by the name of the op. `register_attention` adds to it."""

SCALES = ("scale", "softmax_scale", "sm_scale")
CAUSAL = ("is_causal", "causal")
MASKS = ("attn_mask", "attn_bias", "bias", "mask")
STARTS = (("cu_seqlens_q", "cum_seq_q"), ("cu_seqlens_k", "cum_seq_k", "cu_seqlens_kv"))
"""Of query and key: int [B + 1], where the tokens of each sample begin, if they are packed."""
LENGTHS = (("max_seqlen_q", "max_q"), ("max_seqlen_k", "max_k", "max_seqlen_kv"))
IGNORED = {
    *("return_debug_mask", "compute_log_sumexp", "return_softmax", "return_softmax_lse"),
    *("return_lse", "deterministic", "num_splits", "pack_gqa", "sm_margin", "ver"),
}
"""Arguments that say how to compute, or what else to return."""
_IGNORED_BY: dict[str, frozenset[str]] = {}


def register_attention(op: object, layout: Axes, *, ignored: Collection[str] = ()) -> None:
    """Say that a custom op computes softmax(scale * query @ key.T + mask) @ value.

    Its tokens are then found, and selected steps call it with few queries and all keys, or
    `scaled_dot_product_attention` where it is masked or causal. Call this before compiling.

    The first three tensors of its schema are query [B, L, H, E], key [B, S, H, E] and value
    [B, S, H, V], in the order of axes that `layout` names; [tokens, H, E] if all samples lie one
    after another. It returns the output, shaped like the query, or a tuple that begins with it.
    Usual names are known: `scale`, `softmax_scale`, `sm_scale` (default: E ** -0.5); `is_causal`,
    `causal`; `attn_mask`, `attn_bias`, `mask` (as `scaled_dot_product_attention` takes them);
    `cu_seqlens_q`, `cu_seqlens_k`. A call whose other arguments are neither at their default nor
    None, False, 0 or -1 is not taken for attention.

    Args:
        op: the op, or its name, such as "my_kernels::attention"; it need not exist yet.
        layout: "BHND" (heads before tokens) or "BNHD".
        ignored: names of further arguments that do not change what is computed.

    Raises:
        OptionError: `layout` is something else, or `op` is no op of `torch.ops`.
    """
    if layout not in ("BHND", "BNHD"):
        raise OptionError(f'layout={layout!r}: must be "BHND" or "BNHD"')
    name = registered_name(op)
    AXES[name] = layout
    _IGNORED_BY[name] = frozenset(ignored)


@dataclass(frozen=True)
class AttentionCall:
    """One call of an op of the table, as an attention."""

    node: fx.Node
    name: str
    axes: Axes
    arguments: Mapping[str, Any]
    """All arguments by name, in the order of the schema."""
    positional: int
    """How many of them the node gives by position."""
    named: frozenset[str]
    """Those that it gives by name."""

    @classmethod
    def of(cls, node: fx.Node) -> AttentionCall | None:
        """The call, if its op is in the table and takes three tensors."""
        name = torch_adapter.op_name(node.target)
        if name not in AXES:
            return None
        schema = torch_adapter.op_arguments(node.target)
        if sum(argument.is_tensor for argument in schema) < 3:
            return None
        arguments = torch_adapter.arguments_of(node)
        return cls(node, name, AXES[name], arguments, len(node.args), frozenset(node.kwargs))

    @property
    def tensors(self) -> tuple[str, str, str]:
        """The names of query, key and value."""
        schema = torch_adapter.op_arguments(self.node.target)
        query, key, value = [a.name for a in schema if a.is_tensor][:3]
        return query, key, value

    @property
    def operands(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Query, key and value."""
        query, key, value = (self.arguments[name] for name in self.tensors)
        return query, key, value

    @property
    def others(self) -> list[fx.Node]:
        """Further tensors that it takes, but for where samples begin."""
        apart = {*self.tensors, *sum(STARTS, ())}
        values = {k: v for k, v in self.arguments.items() if k not in apart}
        return [value for value in values.values() if isinstance(value, fx.Node)]

    @property
    def packed(self) -> bool:
        """Whether its operands are [tokens, H, E]."""
        return rank_of(self.operands[0]) == 3

    @property
    def scale(self) -> float | None:
        """What the products are multiplied by; None: E ** -0.5."""
        scale: float | None = self._first(SCALES)
        return scale

    @property
    def causal(self) -> bool:
        """Whether a query attends only to keys up to its own position."""
        return bool(self._first(CAUSAL))

    @property
    def mask(self) -> fx.Node | None:
        """What is added to the products, or says which of them count."""
        mask = self._first(MASKS)
        return mask if isinstance(mask, fx.Node) else None

    @property
    def samples(self) -> int | None:
        """B of packed operands; None if the graph does not say that samples are equally long."""
        starts = [self._first(names) for names in STARTS]
        if starts == [None, None]:
            return 1
        counts = {
            _equal_parts(start, len(operand.meta["val"]))
            for start, operand in zip(starts, self.operands, strict=False)
        }
        return counts.pop() if len(counts) == 1 else None

    def why_not(self) -> str | None:
        """Why this call is no plain attention on tokens that are known, or None if it is."""
        query, key, _ = self.operands
        if rank_of(query) not in (3, 4) or rank_of(key) != rank_of(query):
            return f"its query has the shape {list(shape_of(query))}"
        if self.causal and _length(self, query) != _length(self, key):
            return "it is causal with more keys than queries"
        results = self.node.meta["val"]
        if not isinstance(results, torch.Tensor):
            used = [user.args[1] for user in self.node.users]
            if any(position != 0 for position in used):
                return "the graph uses what it returns beside its output"
        if self.packed and self.samples is None:
            return "nothing in the graph says that its samples are equally long"
        known = {*self.tensors, *IGNORED, *SCALES, *CAUSAL, *MASKS, *sum(LENGTHS, ())}
        known |= {*sum(STARTS, ())} if self.packed else set()
        known |= _IGNORED_BY.get(self.name, frozenset())
        for argument in torch_adapter.op_arguments(self.node.target):
            value = self.arguments[argument.name]
            if argument.name not in known and not _is_idle(value, argument.default):
                return f"of its argument {argument.name}={value}"
        return None

    def _first(self, names: Collection[str]) -> Any:
        found = [self.arguments[name] for name in names if name in self.arguments]
        return found[0] if found else None


def why_unread(graph: fx.Graph) -> str:
    """Why ops of a graph were not taken for attention; empty if all are torch's own."""
    foreign = set()
    for node in graph.nodes:
        name = torch_adapter.op_name(node.target)
        call = AttentionCall.of(node)
        if call is not None and (reason := call.why_not()):
            return f": {name} is not taken for one, because {reason}"
        if name is not None and not name.startswith(("aten::", "prims::")):
            foreign.add(name)
    if not foreign:
        return ""
    names = ", ".join(sorted(foreign))
    return f": if one of {names} is an attention, say so by specdiff.register_attention"


def _length(call: AttentionCall, operand: fx.Node) -> int:
    shape = shape_of(operand)
    if call.packed:
        return shape[0]
    return shape[2 if call.axes == "BHND" else 1]


def _is_idle(value: Any, default: Any) -> bool:
    if value is None or value == default:
        return True
    if isinstance(value, list | tuple):
        return all(item == -1 for item in value)
    return isinstance(value, bool | int | float) and value in (0, -1)


def _equal_parts(starts: object, tokens: int) -> int | None:
    """How many samples begin at `starts`, if they are known and equally long."""
    if not is_tensor(starts):
        return None
    values = _constant(starts)
    if values is None or len(values) < 2 or tokens % (len(values) - 1):
        return None
    step = tokens // (len(values) - 1)
    return len(values) - 1 if values == list(range(0, tokens + 1, step)) else None


def _constant(node: fx.Node) -> list[int] | None:
    """The values of a tensor that depends on no input of the graph."""
    values: dict[fx.Node, Any] = {}
    needed = {node}
    for each in reversed(list(node.graph.nodes)):
        if each in needed:
            needed.update(each.all_input_nodes)
    for each in node.graph.nodes:
        if each not in needed:
            continue
        if each.op == "get_attr" and node.graph.owning_module is not None:
            values[each] = getattr(node.graph.owning_module, str(each.target))
        elif each.op == "call_function":
            args, kwargs = fx.map_arg((each.args, each.kwargs), lambda n: values[n])
            values[each] = each.target(*args, **kwargs)
        else:
            return None
    found = values[node]
    return [int(value) for value in found.tolist()] if isinstance(found, torch.Tensor) else None
