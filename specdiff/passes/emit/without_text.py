"""Without text: the selective program of a step that computes no text.

Text tokens are those of segments that are not prunable. They reach the output through attention
alone, so the caches serve for them: they hold the keys and values of the last step that computed
text. Rows are then active tokens only, and ops on text alone are not emitted.

    before (selective)                       after
    t    = linear(text)                      (not emitted)
    x[r] = cat([t, image[active]])           x[r] = image[active]
    k[r] = linear(x[r])                      k[r] = linear(x[r])
    k    = cache_k.index_put_(text and       k    = cache_k.index_put_(
               active positions, k[r])                  active positions, k[r])
    a[r] = attention(q[r], k, v)             a[r] = attention(q[r], k, v)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from specdiff.errors import Unsupported
from specdiff.passes.emit.rows import RowsEmitter
from specdiff.passes.emit.whole import to_tokens
from specdiff.passes.rules.registry import operands_at
from specdiff.passes.select.axes import Piece
from specdiff.passes.select.selection import Selection

aten = torch.ops.aten


def joins_text(selection: Selection) -> bool:
    """Whether any cached value holds text: otherwise there is no text to leave out."""
    return any(
        piece.segment not in selection.prunable
        for node in selection.cached
        for piece in selection.layout(node)
    )


def emit_without_text(
    module: fx.GraphModule, selection: Selection, sample: int, count: int
) -> fx.GraphModule:
    """A program for K = `count` active tokens and no text.

    Raises Unsupported if text reaches the output by other ways than attention.
    """
    emitter = WithoutTextEmitter(module, selection, sample, count)
    emitter.emit()
    emitter.require_complete()
    return emitter.finish(to_tokens(emitter, selection, emitter.rows))


class WithoutTextEmitter(RowsEmitter):
    """Emits the selective program with text left out of every join."""

    def __init__(
        self, module: fx.GraphModule, selection: Selection, sample: int, count: int
    ) -> None:
        super().__init__(module, selection, sample, count)
        self._absent: set[fx.Node] = set()
        """Values that are not emitted because they need rows of text."""

    def piece_rows(self, piece: Piece) -> int:
        """Rows of one piece of a layout: active tokens alone."""
        return self.counts.get(piece.segment, 0)

    def require_complete(self) -> None:
        """Raise Unsupported if a cached value or a slot was not emitted."""
        for node in (*self.selection.cached, *self.selection.slots):
            if node in self._absent:
                raise Unsupported(f"{node.name} depends on text otherwise than by attention")

    def emit_whole(self, node: fx.Node) -> None:
        """Write `node` with whole operands. Raises Unsupported if one of them is text."""
        if not self._absent.isdisjoint(node.all_input_nodes):
            raise Unsupported(f"{node.name} depends on text otherwise than by attention")
        super().emit_whole(node)

    def _emit_node(self, node: fx.Node, caches: Sequence[fx.Node]) -> None:
        if self._is_absent(node):
            self._absent.add(node)
        else:
            super()._emit_node(node, caches)

    def _is_absent(self, node: fx.Node) -> bool:
        if node.op != "call_function" or node in self.selection.known:
            return False
        if self.selection.extracted_from(node) is not None:
            return True
        operands = self._joined(node) or node.all_input_nodes
        return not self._absent.isdisjoint(operands)

    def _joined(self, node: fx.Node) -> list[fx.Node]:
        """If `node` joins values along the token axis: those of them with active tokens."""
        axis = self.selection.token_axis(node)
        if not self.selection.is_token_wise(node):
            return []
        if not any(part.whole == (node, axis) for part in self.selection.axes.facts[node].parts):
            return []
        return self.selection.token_operands(node)

    def _token_wise(self, node: fx.Node) -> fx.Node:
        joined = self._joined(node)
        if not joined:
            return super()._token_wise(node)
        self.follow(node)
        if node.target is not aten.cat.default:
            raise Unsupported(f"{node.name} joins text to active tokens in a way of its own")
        parts = [self._operand(o, node) for o in operands_at(node, 0) if o in joined]
        axis = self.selection.token_axis(node)
        return parts[0] if len(parts) == 1 else self.call(aten.cat.default, parts, axis)
