"""Invariant: values that no step changes are computed by dense steps alone and kept for the others.

What depends on neither latent, time nor another scalar is the same in every step of a stream: text
embeddings, keys and values of cross-attention, rotary tables. It is kept among the stream's caches,
and a selective step reads it there. Proved from the graph; kept is what saves more arithmetic than
reading it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import fx

from specdiff.passes.base import Pass, PassError
from specdiff.passes.graph.dependence import descendants
from specdiff.passes.plan.cost import Arithmetic
from specdiff.passes.plan.input_roles import VaryingInputs
from specdiff.passes.plan.selective_plan import SelectivePlan
from specdiff.passes.rules.registry import is_tensor, operand_at
from specdiff.passes.rules.shape import VIEWS

aten = torch.ops.aten
FREE = (
    *VIEWS,
    aten.expand.default,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.select.int,
    aten.slice.Tensor,
)
"""Another look at a tensor: what they look at is kept instead."""
WORTH = 2.0
"""FLOPs saved by a byte kept, at least: machines do many more while they read one."""
LEAST = 1e5
"""FLOPs saved by a value kept, at least: it is one more input of every program."""


class InvariantPass(Pass[SelectivePlan, SelectivePlan]):
    """A plan with `fixed` values, which its selective program reads from caches.

    Args:
        varying: tells the inputs of a graph that change from step to step.
    """

    name = "invariant"

    def __init__(self, varying: Callable[[SelectivePlan], VaryingInputs]) -> None:
        self._varying = varying

    def apply(self, value: SelectivePlan) -> SelectivePlan:
        """The plan with fixed values: what only they needed is not computed."""
        fixed = find_fixed(value, descendants(value.axes.graph, self._varying(value).all))
        return value.replan(fixed=fixed)

    def verify(self, value: SelectivePlan, result: SelectivePlan) -> None:
        """No fixed value depends on what varies, and what lived in caches still does."""
        changing = descendants(value.axes.graph, self._varying(value).all)
        for node in result.fixed:
            if node in changing:
                raise PassError(f"{node.name} is kept, but changes from step to step")
        if result.cached != value.cached:
            raise PassError("the invariant pass changed what lives in caches")

    def summary(self, result: SelectivePlan) -> str:
        """How many values are kept, and their size."""
        count = sum(node.meta["val"].nbytes for node in result.fixed)
        return f"{len(result.fixed)} values of {count} bytes kept through a generation"

    def notes(self, result: SelectivePlan) -> Mapping[fx.Node, str]:
        """Which values are kept."""
        return dict.fromkeys(result.fixed, "kept through a generation")


def find_fixed(plan: SelectivePlan, changing: set[fx.Node]) -> tuple[fx.Node, ...]:
    """The last invariant values before what changes, where they are worth their bytes."""
    whole = plan.whole.difference(changing, plan.cached)
    last = (node for node in whole if any(user not in whole for user in node.users))
    found = {_behind_views(node) for node in last} - set(plan.slots)
    arithmetic = Arithmetic(plan)
    kept: list[fx.Node] = []
    for node in plan.axes.graph.nodes:
        if node in found and node in whole and _is_worth(node, arithmetic.behind(node, kept)):
            kept.append(node)
    return tuple(kept)


def _behind_views(node: fx.Node) -> fx.Node:
    while node.target in FREE:
        node = operand_at(node, 0)
    return node


def _is_worth(node: fx.Node, saved: float) -> bool:
    if node.op != "call_function" or not is_tensor(node) or node.meta["val"].is_complex():
        return False
    value: torch.Tensor = node.meta["val"]
    return saved >= max(LEAST, WORTH * value.numel() * value.dtype.itemsize)
