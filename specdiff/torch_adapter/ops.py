"""Ops: names, arguments and storages of what a graph calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

SHARED_CALL = torch.ops.higher_order.invoke_subgraph
"""`(graph, its name, *operands)`: what `torch.compiler.nested_compile_region` makes of a function.

Tried on 2.11 and 2.13: AOTAutograd traces a graph of one name once, Inductor writes it as one
function, and writes to operands (`index_put_`, `copy_`) stay in place, with no copy of a cache.
"""


def mutates(target: Any) -> bool:
    """Whether an op writes to an operand."""
    return isinstance(target, OpOverload) and target._schema.is_mutable


def op_name(target: object) -> str | None:
    """The name of an op, "namespace::name"; None of what is none. Takes a `custom_op`, too."""
    target = getattr(target, "_opoverload", target)
    if isinstance(target, OpOverload):
        return str(target._schema.name)
    return str(target._qualified_op_name) if isinstance(target, OpOverloadPacket) else None


@dataclass(frozen=True)
class OpArgument:
    """One argument of an op."""

    name: str
    is_tensor: bool
    """Whether it is one tensor, and never None."""
    default: Any


def op_arguments(target: Any) -> list[OpArgument]:
    """The arguments of an op in the order of its schema."""
    return [
        OpArgument(a.name, str(a.type) == "Tensor", a.default_value)
        for a in target._schema.arguments
    ]


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call of an op by name, in the order of its schema."""
    schema = op_arguments(node.target)
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | node.kwargs
    return {a.name: given.get(a.name, a.default) for a in schema}


def storage_of(value: Tensor) -> int:
    """What tensors that share memory have in common, fake ones too."""
    return int(StorageWeakRef(value.untyped_storage()).cdata)


def fake_mode_of(value: Tensor) -> FakeTensorMode:
    """The mode that a fake tensor was made in."""
    assert isinstance(value, FakeTensor)
    return value.fake_mode
