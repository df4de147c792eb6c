"""The registry of transfer rules: which output axis of an op is the same as which input axis.

Two axes are the same if they index the same tokens in the same order and position i of the output
depends, along that axis, on position i of the input alone. An op without a rule mixes all axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import fx

from specdiff import torch_adapter
from specdiff.errors import OptionError
from specdiff.passes.base import PassError

Axis = tuple[fx.Node, int]


@dataclass(frozen=True)
class Link:
    """Axis `out_axis` of a node is axis `in_axis` of (one occurrence of) `operand`."""

    out_axis: int
    operand: fx.Node
    in_axis: int


@dataclass(frozen=True)
class Part:
    """Positions [offset, offset + size of part) of `whole` are `part`."""

    whole: Axis
    part: Axis
    offset: int


@dataclass(frozen=True)
class Facts:
    """What a rule states of one node."""

    links: tuple[Link, ...] = ()
    parts: tuple[Part, ...] = ()


TransferRule = Callable[[fx.Node], Facts]
_RULES: dict[Any, TransferRule] = {}


def transfer(*targets: Any) -> Callable[[TransferRule], TransferRule]:
    """Register a rule for these op overloads."""

    def register(rule: TransferRule) -> TransferRule:
        for target in targets:
            if target in _RULES:
                raise ValueError(f"two rules for {target}")
            _RULES[target] = rule
        return rule

    return register


def rule_for(node: fx.Node) -> TransferRule | None:
    """The rule of a node's op; all ops tagged pointwise share one."""
    rule = _RULES.get(node.target)
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        rule = _RULES[torch.Tag.pointwise]
    return rule


def registered_name(op: object) -> str:
    """The name of an op, "namespace::name". Raises OptionError if it is none."""
    name = op if isinstance(op, str) else torch_adapter.op_name(op)
    if name is None or name.count("::") != 1 or not all(name.split("::")):
        raise OptionError(f'op={op!r}: must be an op of torch.ops, or its name "namespace::name"')
    return name


def facts_of(node: fx.Node) -> Facts:
    """The facts of one node; empty for an op without a rule."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return Facts()
    rule = rule_for(node)
    return rule(node) if rule is not None else Facts()


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Static shape of a tensor node."""
    return tuple(node.meta["val"].shape)


def rank_of(node: fx.Node) -> int:
    """Number of axes of a tensor node."""
    return len(shape_of(node))


def axis_index(axis: int, rank: int) -> int:
    """`axis` counted from the front."""
    return axis % rank if rank else 0


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by keyword."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def start_of(node: fx.Node, position: int, size: int) -> int:
    """Where a slice begins on an axis of this size; a negative `start` counts from the end."""
    return slice(argument(node, position, "start"), None).indices(size)[0]


def operand_at(node: fx.Node, position: int) -> fx.Node:
    """The operand at `position`, which by the op's schema is one tensor."""
    value = node.args[position]
    if not isinstance(value, fx.Node):
        raise PassError(f"{node.name}: argument {position} is no tensor")
    return value


def operands_at(node: fx.Node, position: int) -> list[fx.Node]:
    """The operands at `position`, which by the op's schema is a list of tensors."""
    value = node.args[position]
    if not isinstance(value, list | tuple):
        raise PassError(f"{node.name}: argument {position} is no list")
    return [item for item in value if isinstance(item, fx.Node)]


def operands(node: fx.Node) -> list[fx.Node]:
    """The operands of a node in the order of its arguments; repeated ones are repeated."""
    nodes: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), nodes.append)
    return nodes


def is_tensor(value: Any) -> TypeGuard[fx.Node]:
    """Whether `value` is a node that holds one tensor."""
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def same_axes(node: fx.Node, operand: fx.Node, skip: tuple[int, ...] = ()) -> Facts:
    """Every axis of `node` is the same axis of `operand`, except those in `skip`."""
    rank = rank_of(node)
    skipped = {axis_index(axis, rank) for axis in skip}
    return Facts(tuple(Link(axis, operand, axis) for axis in range(rank) if axis not in skipped))


def broadcast_links(node: fx.Node, operand: fx.Node, trailing: int = 0) -> list[Link]:
    """Links of axes aligned from the right that keep their size, without the last `trailing`."""
    out, shape = shape_of(node), shape_of(operand)
    shift = len(out) - len(shape)
    return [
        Link(axis + shift, operand, axis)
        for axis, size in enumerate(shape[: len(shape) - trailing])
        if size == out[axis + shift]
    ]
