"""Invariant: dense steps store the values that no step changes; selective steps read them.

A value that depends on neither latent, time nor another scalar is the same in every step of a
stream: text embeddings, keys and values of cross-attention, rotary tables. It is stored beside the
caches if that saves more arithmetic than reading it costs.

    dense step                               selective step
    text    = linear(prompt)                 (not computed)
    k       = linear(text)     -> fixed k    k   = fixed k
    out     = attention(q(x), k, v)          out = attention(q(x)[active], k, v)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import fx

from specdiff.passes.base import Pass, PassError
from specdiff.passes.graph.dependence import descendants
from specdiff.passes.rules.registry import is_tensor, operand_at
from specdiff.passes.rules.shape import VIEWS
from specdiff.passes.select.cost import Arithmetic
from specdiff.passes.select.input_roles import VaryingInputs
from specdiff.passes.select.selection import Selection

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
"""Ops that only look at a tensor: that tensor is stored instead."""
WORTH = 2.0
"""FLOPs that each stored byte must save: a machine does many more while it reads one byte."""
LEAST = 1e5
"""FLOPs that a stored value must save: it is one more input of every program."""


class InvariantPass(Pass[Selection, Selection]):
    """Adds `fixed` values to a selection.

    Args:
        varying: finds the inputs of a graph that change from step to step.
    """

    name = "invariant"

    def __init__(self, varying: Callable[[Selection], VaryingInputs]) -> None:
        self._varying = varying

    def apply(self, value: Selection) -> Selection:
        """The selection with fixed values; what only they needed is no longer computed."""
        fixed = find_fixed(value, descendants(value.axes.graph, self._varying(value).all))
        return value.with_needs(fixed=fixed)

    def verify(self, value: Selection, result: Selection) -> None:
        """Check that no fixed value depends on what varies, and that the caches are the same."""
        changing = descendants(value.axes.graph, self._varying(value).all)
        for node in result.fixed:
            if node in changing:
                raise PassError(f"{node.name} is stored, but changes from step to step")
        if result.cached != value.cached:
            raise PassError("the invariant pass changed what lives in caches")

    def summary(self, result: Selection) -> str:
        """How many values are stored, and their size."""
        count = sum(node.meta["val"].nbytes for node in result.fixed)
        return f"{len(result.fixed)} values of {count} bytes stored for a generation"

    def notes(self, result: Selection) -> Mapping[fx.Node, str]:
        """Which values are stored."""
        return dict.fromkeys(result.fixed, "stored for a generation")


def find_fixed(selection: Selection, changing: set[fx.Node]) -> tuple[fx.Node, ...]:
    """The last invariant values before something changes, if they are worth their bytes."""
    whole = selection.whole.difference(changing, selection.cached)
    last = (node for node in whole if any(user not in whole for user in node.users))
    candidates = {_behind_views(node) for node in last} - set(selection.slots)
    arithmetic = Arithmetic(selection)
    fixed: list[fx.Node] = []
    for node in selection.axes.graph.nodes:
        if node not in candidates or node not in whole:
            continue
        if _is_worth(node, arithmetic.behind(node, fixed)):
            fixed.append(node)
    return tuple(fixed)


def _behind_views(node: fx.Node) -> fx.Node:
    while node.target in FREE:
        node = operand_at(node, 0)
    return node


def _is_worth(node: fx.Node, saved: float) -> bool:
    if node.op != "call_function" or not is_tensor(node) or node.meta["val"].is_complex():
        return False
    value: torch.Tensor = node.meta["val"]
    return saved >= max(LEAST, WORTH * value.numel() * value.dtype.itemsize)
