"""Written: calls of custom ops that write to operands, as tracing leaves them.

model                       traced
norm_(q, k, weight)         r = auto_functionalized_v2(norm_, weight=weight, _q_base_index=0,
                                  _k_base_index=1, _all_bases=[q, k])
                            q = r[1]; k = r[2], behind what the op returns itself, or None
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from specdiff.torch_adapter.ops import arguments_of

FUNCTIONAL = torch.ops.higher_order.auto_functionalized_v2
"""Tried on 2.13; the first version (`auto_functionalized`) is not read, and stays as it is."""


@dataclass(frozen=True)
class OpCall:
    """One call of an op."""

    op: OpOverload
    arguments: Mapping[str, Any]
    """All arguments by name, in the order of the schema."""
    results: Mapping[str | int, int]
    """Of each result, its place in the tuple that the node returns: by number where the op returns
    it, by the argument's name where it is written. A node that is one tensor has none."""


def op_call(node: fx.Node) -> OpCall | None:
    """The call that a node is, if each operand that it writes to is written as a whole."""
    if node.target is FUNCTIONAL:
        return _functional_call(node)
    if not isinstance(node.target, OpOverload):
        return None
    count = len(node.target._schema.returns)
    results: dict[str | int, int] = {i: i for i in range(count)} if count > 1 else {}
    return OpCall(node.target, arguments_of(node), results)


def _functional_call(node: fx.Node) -> OpCall | None:
    op, kwargs = node.args[0], dict(node.kwargs)
    bases = kwargs.pop("_all_bases")
    if not isinstance(op, OpOverload) or not isinstance(bases, list | tuple):
        return None
    written = [a.name for a in op._schema.arguments if a.alias_info and a.alias_info.is_write]
    indices = [kwargs.pop(f"_{name}_base_index", None) for name in written]
    for name in written:
        kwargs.pop(f"_{name}_alias", None)
    names = [argument.name for argument in op._schema.arguments]
    if sorted(map(str, indices)) != sorted(map(str, range(len(bases)))) or set(kwargs) - set(names):
        return None  # a part of a value is written, or two parts of one
    places = dict(zip(written, (int(str(index)) for index in indices), strict=True))
    given = kwargs | {name: bases[place] for name, place in places.items()}
    returns = [i for i, each in enumerate(op._schema.returns) if each.alias_info is None]
    if len(returns) < len(op._schema.returns):
        return None
    first = max(len(returns), 1)
    results: dict[str | int, int] = {i: i for i in returns}
    results |= {name: first + place for name, place in places.items()}
    return OpCall(op, {name: given[name] for name in names if name in given}, results)
