"""Rows: write the token-selective program from the forms that the selection says.

Its inputs are those of the traced graph, then the caches, then `active`, int64 [B, K], ascending;
each prunable segment has its share of K (`specdiff.program.share_out`). If anything is tabulated,
the number of a table row follows, int64 [1].

    before (every token)                     after (x[r] are rows of x: text, and active tokens)
    x   = cat([text, image])     [B, S, C]   x[r] = cat([text, image[active]])
    q   = linear(norm(x), wq)    [B, S, C]   q[r] = linear(norm(x[r]), wq)
    k   = linear(norm(x), wk)    [B, S, C]   k[r] = linear(norm(x[r]), wk)
                                             k    = cache_k.index_put_(positions, k[r])
    a   = attention(q, k, v)     [B, S, C]   a[r] = attention(q[r], k, v)
    x   = x + mod * a                        x[r] = x[r] + table[row] * a[r]
    out = x[:, text:]            [B, N, C]   out[active] = x[r][:, text:]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from specdiff.passes.emit.own_call import own_call
from specdiff.passes.emit.whole import WholeEmitter, inverse, to_tokens
from specdiff.passes.rules.attention import ATTENTION, OWN_CALL, Attention
from specdiff.passes.rules.registry import operand_at, rank_of, shape_of
from specdiff.passes.rules.shape import VIEWS
from specdiff.passes.select.axes import ClassId, Layout, Piece
from specdiff.passes.select.cache_layout import decode, encode
from specdiff.passes.select.selection import Selection
from specdiff.program import share_out

aten = torch.ops.aten


def emit_selective(
    module: fx.GraphModule, selection: Selection, sample: int, count: int
) -> fx.GraphModule:
    """A program that computes K = `count` active tokens and updates their cache rows in place."""
    emitter = RowsEmitter(module, selection, sample, count)
    emitter.emit()
    return emitter.finish(to_tokens(emitter, selection, emitter.rows))


def emit_block_selective(
    module: fx.GraphModule, selection: Selection, sample: int, count: int
) -> fx.GraphModule:
    """The same for one block of a model; inactive rows of its outputs come from the caches."""
    emitter = RowsEmitter(module, selection, sample, count, numbered=True)
    emitter.emit()
    return emitter.finish_block()


class RowsEmitter(WholeEmitter):
    """Emits the selective program."""

    def __init__(
        self,
        module: fx.GraphModule,
        selection: Selection,
        sample: int,
        count: int,
        numbered: bool = False,
    ) -> None:
        super().__init__(module, selection, sample, numbered)
        self.count = count
        shares = share_out(selection.lengths, count)
        self.counts: dict[ClassId, int] = dict(zip(selection.prunable, shares, strict=True))
        """Rows of each prunable segment: its active tokens."""
        self.rows: dict[fx.Node, fx.Node] = {}
        self._positions: dict[Layout, fx.Node] = {}
        self._causal: dict[tuple[Layout, int, int, int], fx.Node] = {}
        self._tables: dict[tuple[fx.Node, int, int | None], fx.Node] = {}

    def emit(self) -> None:
        """All values; inputs are the graph's, then the caches, then `active` [B, K]."""
        self.add_inputs()
        selection = self.selection
        caches = self.add_caches()
        for node in selection.fixed:
            (self.whole[node],) = caches.pop(node)
        tables = {node: caches.pop(node)[0] for node in selection.tabulated}
        batch = selection.axes.samples
        self.active = self.add_tensor(
            "active", (batch, self.count), selection.cached[0], torch.int64
        )
        if tables:
            self.row = self.add_tensor("row", (1,), selection.cached[0], torch.int64)
        self.add_number()
        batch_rows = self.call(aten.arange.default, batch, device=self.device)
        self.batch_rows = self.call(aten.unsqueeze.default, batch_rows, 1)
        for node in selection.axes.graph.nodes:
            if node in tables:
                self.follow(node)
                self.whole[node] = self._look_up(tables[node])
            self._emit_node(node, caches.get(node, ()))

    def _look_up(self, table: fx.Node) -> fx.Node:
        """The row of a table that the input `row` names."""
        picked = self.call(aten.index_select.default, table, 0, self.row)
        return self.call(aten.squeeze.dim, picked, 0)

    def _emit_node(self, node: fx.Node, caches: Sequence[fx.Node]) -> None:
        selection = self.selection
        known = node in selection.known
        token_wise = node in selection.rows and selection.is_token_wise(node) and not known
        if token_wise:
            self.rows[node] = self._token_wise(node)
        if caches:
            self.whole[node] = self._densify(node, caches)
        elif node in selection.whole and node.op not in ("placeholder", "output") and not known:
            source = selection.extracted_from(node)
            if source is None:
                self.emit_whole(node)
            else:
                self.whole[node] = self._cut(node, self.rows[source])
        if (
            node in selection.rows
            and not token_wise
            and selection.axes.batch_axis(node) is not None
        ):
            self.rows[node] = self._gather_whole(node)

    def row_count(self, layout: Layout) -> int:
        """Rows of a layout: the active tokens of prunable segments, all tokens of others."""
        return sum(map(self.piece_rows, layout))

    def piece_rows(self, piece: Piece) -> int:
        """Rows of one piece of a layout."""
        return self.counts.get(piece.segment, piece.length)

    def positions(self, layout: Layout) -> fx.Node:
        """int64 [B, rows]: the position of each row of a layout in the whole axis."""
        if layout not in self._positions:
            self._positions[layout] = self._build_positions(layout)
        return self._positions[layout]

    def _build_positions(self, layout: Layout) -> fx.Node:
        pieces = []
        for piece in layout:
            if not self.piece_rows(piece):
                continue
            if piece.segment in self.counts:
                pieces.append(self._active_positions(piece))
                continue
            stop = piece.offset + piece.length
            span = self.call(aten.arange.start, piece.offset, stop, device=self.device)
            shape = [shape_of(self.active)[0], piece.length]
            pieces.append(self.call(aten.expand.default, span, shape))
        return pieces[0] if len(pieces) == 1 else self.call(aten.cat.default, pieces, 1)

    def _active_positions(self, piece: Piece) -> fx.Node:
        """Positions of a segment's active tokens in an axis that has the segment as `piece`."""
        earlier = self.selection.prunable[: self.selection.prunable.index(piece.segment)]
        start = sum(self.counts[segment] for segment in earlier)
        active = self.active
        if len(self.selection.prunable) > 1:
            stop = start + self.counts[piece.segment]
            active = self.call(aten.slice.Tensor, active, 1, start, stop)
        shift = piece.offset - self.selection.first_token(piece.segment)
        return self.call(aten.add.Tensor, active, shift) if shift else active

    def gather(self, value: fx.Node, axis: int, batch: int | None, layout: Layout) -> fx.Node:
        """The rows of `layout` along `axis`; a value without batch axis gains one in front."""
        index = self.positions(layout)
        rest = [a for a in range(rank_of(value)) if a not in (axis, batch)]
        if batch is not None and shape_of(value)[batch] == 1:
            value = self.call(aten.squeeze.dim, value, batch)
            shifted = [a - (a > batch) for a in (axis, *rest)]
            picked = self.call(aten.index.Tensor, self.permute(value, shifted), [index])
        elif batch is None:
            picked = self.call(aten.index.Tensor, self.permute(value, [axis, *rest]), [index])
            return self.permute(picked, inverse([0, axis + 1, *(a + 1 for a in rest)]))
        else:
            ordered = self.permute(value, [batch, axis, *rest])
            picked = self.call(aten.index.Tensor, ordered, [self.batch_rows, index])
        return self.permute(picked, inverse([batch, axis, *rest]))

    def _gather_whole(self, node: fx.Node) -> fx.Node:
        axis = self.selection.token_axis(node)
        assert axis is not None
        batch = self.selection.axes.batch_axis(node)
        return self.gather(self.whole[node], axis, batch, self.selection.layout(node))

    def _densify(self, node: fx.Node, caches: Sequence[fx.Node]) -> fx.Node:
        order = self.selection.cache_order(node)
        fresh = self.permute(self.rows[node], order)
        where = [self.batch_rows, self.positions(self.selection.layout(node))]
        stored = encode(self, fresh, self.selection.codes.get(node))
        written = [
            self.call(aten.index_put_.default, cache, where, part)
            for cache, part in zip(caches, stored, strict=True)
        ]
        # decoded, so that this step reads fresh rows as the next step will
        value = decode(self, written, node.meta["val"].dtype)
        return self.permute(value, inverse(order))

    def _cut(self, node: fx.Node, rows: fx.Node) -> fx.Node:
        """A piece of an axis, cut out of that axis's rows."""
        part = next(p for p in self.selection.axes.facts[node].parts if p.part[0] is node)
        operand, axis = part.whole
        stop = part.offset + shape_of(node)[axis]
        before = tuple(p for p in self.selection.layout(operand) if p.offset < part.offset)
        inside = tuple(p for p in self.selection.layout(operand) if part.offset <= p.offset < stop)
        start = self.row_count(before)
        return self.call(aten.slice.Tensor, rows, axis, start, start + self.row_count(inside))

    def _token_wise(self, node: fx.Node) -> fx.Node:
        self.follow(node)
        if node.target is ATTENTION:
            return self._attention(node)
        cut = (node, self.selection.token_axis(node))
        if any(part.part == cut for part in self.selection.axes.facts[node].parts):
            return self._cut(node, self.rows[operand_at(node, 0)])
        if node.target in VIEWS:
            source = self.rows[operand_at(node, 0)]
            return self.call(aten.reshape.default, source, self._row_shape(node))
        if node.target is aten.expand.default:
            source = self._operand(operand_at(node, 0), node)
            return self.call(aten.expand.default, source, self._row_shape(node))
        args = fx.map_arg(node.args, lambda operand: self._operand(operand, node))
        kwargs = fx.map_arg(node.kwargs, lambda operand: self._operand(operand, node))
        return self.call(node.target, *args, **kwargs)

    def _attention(self, node: fx.Node) -> fx.Node:
        attention = Attention.of(node)
        query = self.rows.get(attention.query)
        if query is None:
            query = self.whole[attention.query]
        key, value = self.whole[attention.key], self.whole[attention.value]
        mask = self._mask_rows(attention)
        self.importance.observe(attention, query, key, mask)
        if OWN_CALL in node.meta:
            return own_call(self, node.meta[OWN_CALL], query, key, value)
        # causality becomes a mask, because rows no longer stand at their positions; operands are
        # emitted one by one, because one value may be query, key and value at once
        options = {k: v for k, v in node.kwargs.items() if k in ("scale", "enable_gqa")}
        return self.call(node.target, query, key, value, mask, **options)

    def _mask_rows(self, attention: Attention) -> fx.Node | None:
        """The rows of a mask [..., L, S] along the query axis; a broadcast mask is unchanged."""
        if attention.causal:
            return self._causal_rows(attention)
        if attention.mask is None:
            return None
        mask = self.whole[attention.mask]
        if rank_of(mask) < 2 or shape_of(mask)[-2] == 1:
            return mask
        missing = rank_of(attention.query) - rank_of(mask)
        if missing:
            mask = self.call(aten.reshape.default, mask, [1] * missing + list(shape_of(mask)))
        batch = self.selection.axes.batch_axis(attention.query)
        layout = self.selection.layout(attention.query)
        return self.gather(mask, rank_of(mask) - 2, batch, layout)

    def _causal_rows(self, attention: Attention) -> fx.Node:
        """Boolean [B, 1, rows, S]: the keys up to each row's own position."""
        layout, batch = (
            self.selection.layout(attention.query),
            self.selection.axes.batch_axis(attention.query),
        )
        assert batch is not None
        keys = shape_of(attention.key)[-2]
        rank = rank_of(attention.query)
        which = (layout, keys, batch, rank)
        if which not in self._causal:
            positions = self.positions(layout)
            shape = [1] * rank
            shape[batch], shape[-2] = shape_of(positions)
            rows = self.call(aten.reshape.default, positions, shape)
            span = self.call(aten.arange.default, keys, device=self.device)
            self._causal[which] = self.call(aten.ge.Tensor, rows, span)
        return self._causal[which]

    def _row_shape(self, node: fx.Node) -> list[int]:
        shape = list(shape_of(node))
        axis = self.selection.token_axis(node)
        assert axis is not None
        shape[axis] = self.row_count(self.selection.layout(node))
        return shape

    def _operand(self, operand: fx.Node, user: fx.Node) -> fx.Node:
        """`operand` in the form that token-wise `user` needs."""
        if operand not in self.selection.token_operands(user):
            return self.whole[operand]
        if operand in self.rows:
            return self.rows[operand]
        return self._aligned_table(operand, user)

    def _aligned_table(self, table: fx.Node, user: fx.Node) -> fx.Node:
        """Rows of a value without batch axis, broadcastable to the rows of `user`."""
        value = self.whole[table]
        missing = rank_of(user) - rank_of(table)
        if missing:
            value = self.call(aten.reshape.default, value, [1] * missing + list(shape_of(value)))
        axis = self.selection.token_axis(table)
        assert axis is not None
        batch = self.selection.axes.batch_axis(user)
        key = (table, missing, batch)
        if key not in self._tables:
            self._tables[key] = self.gather(
                value, axis + missing, batch, self.selection.layout(table)
            )
        return self._tables[key]
