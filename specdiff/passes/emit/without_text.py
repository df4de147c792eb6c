"""Frozen: the selective program of a step that computes no text.

Text tokens are those of segments that are not prunable. They reach the output through attention
alone, so what serves in their place is in the caches: the keys and values of the last step that
computed them. Rows are then active tokens only, and whatever is text alone is not emitted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from specdiff.errors import Unsupported
from specdiff.passes.emit.rows import RowsEmitter
from specdiff.passes.emit.whole import to_tokens
from specdiff.passes.plan.axes import Piece
from specdiff.passes.plan.selective_plan import SelectivePlan
from specdiff.passes.rules.registry import operands_at

aten = torch.ops.aten


def joins_text(plan: SelectivePlan) -> bool:
    """Whether text lies in any value beside active tokens: otherwise there is none to leave out."""
    return any(
        piece.segment not in plan.prunable for node in plan.cached for piece in plan.layout(node)
    )


def emit_frozen(
    module: fx.GraphModule, plan: SelectivePlan, sample: int, count: int
) -> fx.GraphModule:
    """K = `count` active tokens, and no text. Raises Unsupported if something else reads text."""
    emitter = FrozenEmitter(module, plan, sample, count)
    emitter.emit()
    emitter.require_complete()
    return emitter.finish(to_tokens(emitter, plan, emitter.rows))


class FrozenEmitter(RowsEmitter):
    """As the selective program, text left out of every join."""

    def __init__(
        self, module: fx.GraphModule, plan: SelectivePlan, sample: int, count: int
    ) -> None:
        super().__init__(module, plan, sample, count)
        self._absent: set[fx.Node] = set()
        """What would need rows of text that are not computed."""

    def piece_rows(self, piece: Piece) -> int:
        """Active tokens alone: what joins them may be text that no attention is known to read."""
        return self.counts.get(piece.segment, 0)

    def require_complete(self) -> None:
        """Raise Unsupported if a value that is needed was not emitted."""
        for node in (*self.plan.cached, *self.plan.slots):
            if node in self._absent:
                raise Unsupported(f"{node.name} depends on text otherwise than by attention")

    def emit_whole(self, node: fx.Node) -> None:
        """`node` with whole operands. Raises Unsupported if one is text: no cache has the whole."""
        if not self._absent.isdisjoint(node.all_input_nodes):
            raise Unsupported(f"{node.name} depends on text otherwise than by attention")
        super().emit_whole(node)

    def _emit_node(self, node: fx.Node, caches: Sequence[fx.Node]) -> None:
        if self._is_absent(node):
            self._absent.add(node)
        else:
            super()._emit_node(node, caches)

    def _is_absent(self, node: fx.Node) -> bool:
        if node.op != "call_function" or node in self.plan.known:
            return False
        if self.plan.extracted_from(node) is not None:
            return True
        operands = self._joined(node) or node.all_input_nodes
        return not self._absent.isdisjoint(operands)

    def _joined(self, node: fx.Node) -> list[fx.Node]:
        """Operands with active tokens of a value that joins them along tokens with others."""
        axis = self.plan.token_axis(node)
        if not self.plan.is_token_wise(node):
            return []
        if not any(part.whole == (node, axis) for part in self.plan.axes.facts[node].parts):
            return []
        return self.plan.token_operands(node)

    def _token_wise(self, node: fx.Node) -> fx.Node:
        joined = self._joined(node)
        if not joined:
            return super()._token_wise(node)
        self.follow(node)
        if node.target is not aten.cat.default:
            raise Unsupported(f"{node.name} joins text to active tokens in a way of its own")
        parts = [self._operand(o, node) for o in operands_at(node, 0) if o in joined]
        axis = self.plan.token_axis(node)
        return parts[0] if len(parts) == 1 else self.call(aten.cat.default, parts, axis)
