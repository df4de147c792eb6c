"""Importance: attention received by each prunable token, from a strided sample of queries.

The N x N attention map is never materialised: each attention contributes softmax rows of at most
`sample` queries, summed over heads and averaged over those queries, accumulated in float32 over all
layers (paper, equation 1: his; exact when the sample is all queries).
"""

from __future__ import annotations

import torch
from torch import fx

from specdiff.passes.axes import ClassId
from specdiff.passes.rules.attention import Attention
from specdiff.passes.rules.registry import rank_of, shape_of
from specdiff.passes.selective import SelectivePlan
from specdiff.passes.writer import GraphWriter

aten = torch.ops.aten
GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, modulo 1, fill the range from 0 to 1 evenly, however many are taken."""


class ImportanceSum:
    """Accumulates over the attentions of one program."""

    def __init__(self, writer: GraphWriter, plan: SelectivePlan, sample: int) -> None:
        self._writer = writer
        self._plan = plan
        self._sample = sample
        self._totals: dict[ClassId, fx.Node] = {}
        self._observed = 0

    def observe(self, found: Attention, query: fx.Node, key: fx.Node, mask: fx.Node | None) -> None:
        """Add one attention, given its emitted operands (query may be rows)."""
        layout = self._plan.axes.layout(found.key, rank_of(found.key) - 2)
        pieces = [piece for piece in layout if piece.segment in self._plan.prunable]
        if not pieces or not self._supported(found):
            return
        call = self._writer.call
        received = self._received(found, query, key, mask)
        for piece in pieces:
            share = call(aten.slice.Tensor, received, 1, piece.offset, piece.offset + piece.length)
            total = self._totals.get(piece.segment)
            if total is not None:
                share = call(aten.add.Tensor, total, share)
            self._totals[piece.segment] = share

    def result(self) -> fx.Node:
        """float32 [B, N]; ones for segments that no attention reads as keys."""
        batch = self._plan.axes.samples
        call, device = self._writer.call, self._writer.device
        shares = [
            self._totals[segment]
            if segment in self._totals
            else call(aten.ones.default, [batch, length], dtype=torch.float32, device=device)
            for segment, length in zip(self._plan.prunable, self._plan.lengths, strict=True)
        ]
        return shares[0] if len(shares) == 1 else call(aten.cat.default, shares, 1)

    def _supported(self, found: Attention) -> bool:
        """Causal attentions are left out: what a token receives there tells its position first."""
        rank, axes = rank_of(found.query), self._plan.axes
        return not found.causal and rank >= 3 and axes.batch_axis(found.query) == 0

    def _received(
        self, found: Attention, query: fx.Node, key: fx.Node, mask: fx.Node | None
    ) -> fx.Node:
        call = self._writer.call
        rows = shape_of(query)[-2]
        every = self._sampled_rows(rows)
        # scaled before the product: of all its values the logits are the most
        sampled = call(aten.mul.Tensor, _every(self._writer, query, every), found.scale)
        if found.grouped:
            groups = shape_of(query)[-3] // shape_of(key)[-3]
            key = call(aten.repeat_interleave.self_int, key, groups, rank_of(key) - 3)
        logits = call(aten.matmul.default, sampled, call(aten.transpose.int, key, -2, -1))
        if mask is not None:
            logits = self._masked(logits, mask, every)
        # a query that may attend to nothing gives no importance, rather than nan
        softmax = aten.softmax.int if mask is None else aten._safe_softmax.default
        weights = call(softmax, logits, -1, torch.float32)
        heads = list(range(1, rank_of(weights) - 2))
        # averaged, so that steps with many and with few computed queries compare
        mean = call(aten.mean.dim, weights, [rank_of(weights) - 2])
        return call(aten.sum.dim_IntList, mean, heads) if heads else mean

    def _sampled_rows(self, rows: int) -> range:
        """Evenly strided, from another row in each attention.

        Attention is mostly local: what lies near one and the same sample would win.
        """
        stride = -(-rows // self._sample)
        start = int(self._observed * GOLDEN % 1 * stride)
        self._observed += 1
        return range(start, rows, stride)

    def _masked(self, logits: fx.Node, mask: fx.Node, every: range) -> fx.Node:
        call = self._writer.call
        if rank_of(mask) > 1 and shape_of(mask)[-2] != 1:
            mask = _every(self._writer, mask, every)
        if mask.meta["val"].dtype is not torch.bool:
            return call(aten.add.Tensor, logits, mask)
        blocked = call(aten.logical_not.default, mask)
        return call(aten.masked_fill.Scalar, logits, blocked, float("-inf"))


def _every(writer: GraphWriter, value: fx.Node, rows: range) -> fx.Node:
    if rows.step == 1:
        return value
    axis = rank_of(value) - 2
    return writer.call(aten.slice.Tensor, value, axis, rows.start, rows.stop, rows.step)
