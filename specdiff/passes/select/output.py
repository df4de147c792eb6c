"""Output: split a graph into what computes a value per token, and the tail that follows it.

For example:

    ... -> blocks -> proj_out [B, N, C] | reshape, permute -> velocity [B, 4, H, W]
                     slot               | tail
"""

from __future__ import annotations

import dataclasses

from torch import fx

from specdiff.errors import Unsupported
from specdiff.passes.graph.dependence import descendants
from specdiff.passes.rules.attention import ATTENTION
from specdiff.passes.rules.registry import is_tensor
from specdiff.passes.select.axes import AxisFacts, ClassId, Layout


@dataclasses.dataclass(frozen=True)
class TokenOutput:
    """The token-level output of a graph."""

    slots: tuple[fx.Node, ...]
    """The last values that the model computes token by token."""
    segments: tuple[ClassId, ...]
    """The segments of the slots, in order; tokens are numbered through all of them."""
    tail: tuple[fx.Node, ...]
    """Nodes from the slots to the outputs, in order."""


def find_output(axes: AxisFacts) -> TokenOutput:
    """Walk back from the outputs to the first values with segments along one axis.

    Raises Unsupported if there are none, or if two of them share tokens.
    """
    slots: dict[fx.Node, frozenset[ClassId]] = {}
    tail: set[fx.Node] = set()
    attended = {n for n in axes.graph.nodes if n.target is ATTENTION}
    predicted = descendants(axes.graph, attended)
    # others, such as tables of positions that a model keeps, are made anew from the inputs
    _walk_back(axes, [node for node in axes.outputs() if node in predicted], slots, tail)
    if tail & attended or not slots:
        raise Unsupported("no token segment reaches the output of the model token by token")
    names = ", ".join(sorted(node.name for node in slots))
    order = {node: i for i, node in enumerate(axes.graph.nodes)}
    while shared := _sharing(slots):
        # several outputs may come from one value: what lies between belongs to the tail
        last = max(shared, key=order.__getitem__)
        if last in attended:
            raise Unsupported(f"the output is made of several token-level values: {names}")
        del slots[last]
        tail.add(last)
        _walk_back(axes, last.all_input_nodes, slots, tail)
    ordered = tuple(sorted(slots, key=order.__getitem__))
    if len({slot.meta["val"].dtype for slot in ordered}) > 1:
        raise Unsupported(f"{names} have different dtypes")
    pieces = [piece.segment for slot in ordered for piece in _token_layout(axes, slot)]
    if len(set(pieces)) < len(pieces):
        raise Unsupported(f"{names} hold some of their tokens twice")
    return TokenOutput(ordered, tuple(pieces), tuple(n for n in order if n in tail))


def _walk_back(
    axes: AxisFacts,
    start: list[fx.Node],
    slots: dict[fx.Node, frozenset[ClassId]],
    tail: set[fx.Node],
) -> None:
    """Walk from `start` to values with segments: those go into `slots`, all before into `tail`."""
    pending = list(start)
    while pending:
        node = pending.pop()
        if node in slots or node in tail:
            continue
        layout = _token_layout(axes, node)
        if layout:
            slots[node] = frozenset(piece.segment for piece in layout)
        elif node.op == "call_function":
            tail.add(node)
            pending += node.all_input_nodes


def _sharing(slots: dict[fx.Node, frozenset[ClassId]]) -> set[fx.Node]:
    """Slots that share a segment with another slot."""
    return {
        one
        for one, here in slots.items()
        for other, there in slots.items()
        if one is not other and here & there
    }


def _token_layout(axes: AxisFacts, node: fx.Node) -> Layout:
    """The layout of the one axis with segments; empty unless the value also has a batch axis."""
    if not is_tensor(node) or node.op != "call_function" or axes.batch_axis(node) is None:
        return ()
    token_axes = axes.axes_with(node, *axes.segments)
    return axes.layout(node, token_axes[0]) if len(token_axes) == 1 else ()
