"""Importance: attention received by each prunable token, from a strided sample of queries.

The N x N attention map is never materialised: each attention contributes softmax rows of at most
`sample` queries, summed over heads and averaged over those queries, accumulated in float32 over all
layers (paper, equation 1: his; exact when the sample is all queries).

Attention is mostly local, so that tokens near a sampled query seem to receive more. As the sample
is strided, this error repeats with the stride, and is divided out (`_levelled`).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
from torch import fx

from specdiff.passes.graph.writer import GraphWriter
from specdiff.passes.plan.axes import ClassId, Piece
from specdiff.passes.plan.selective_plan import SelectivePlan
from specdiff.passes.rules.attention import ATTENTION, Attention
from specdiff.passes.rules.registry import rank_of, shape_of

aten = torch.ops.aten
BITS, GOLDEN = 16, 40503
"""Multiples of GOLDEN / 2^BITS, modulo 1, fill 0 to 1 evenly, however many there are.
Whole numbers, so that a program which is told where it begins finds the same rows."""

PERIODS = 8
"""Strides in a segment, at least, for their average to show what repeats."""
NOTHING = 1e-30
"""Attention received below which there is no share of it."""
APART = 0.25
"""Of rows s tokens apart, the squared distance that two should have in a picture, over s: few of
an even sample are nearer; where they lie on a diagonal it is 2 / s."""
FEWEST = 8
"""Rows that an attention is sampled at, where it computes as many and the sample allows."""


class ImportanceSum:
    """Accumulates over the attentions of one program."""

    def __init__(self, writer: GraphWriter, plan: SelectivePlan, sample: int) -> None:
        self.before: fx.Node | None = None
        """int64 [1], an input: attentions of the model before this program; None: it is all."""
        self._writer = writer
        self._plan = plan
        self._sample = sample
        self._totals: dict[ClassId, fx.Node] = {}
        self._observed = 0

    def observe(self, found: Attention, query: fx.Node, key: fx.Node, mask: fx.Node | None) -> None:
        """Add one attention, given its emitted operands (query may be rows)."""
        pieces = _prunable_keys(self._plan, found)
        if not pieces or not self._sample:
            return
        call = self._writer.call
        rows, every_row = shape_of(query)[-2], shape_of(found.query)[-2]
        sample = self._sampled_rows(rows, every_row)
        received = self._received(found, query, key, mask, sample)
        strided = rows == every_row == shape_of(key)[-2]
        for piece in pieces:
            share = call(aten.slice.Tensor, received, 1, piece.offset, piece.offset + piece.length)
            if strided:
                share = self._levelled(share, self._stride(rows, every_row))
            total = self._totals.get(piece.segment)
            if total is None:
                # added to nothing, so that the first block does what all others do
                total = call(aten.zeros_like.default, share)
            self._totals[piece.segment] = call(aten.add.Tensor, total, share)

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

    def _received(
        self,
        found: Attention,
        query: fx.Node,
        key: fx.Node,
        mask: fx.Node | None,
        every: range | fx.Node,
    ) -> fx.Node:
        """float32 [B, S]: what each key receives of `every` sampled row."""
        call = self._writer.call
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

    def _levelled(self, share: fx.Node, stride: int) -> fx.Node:
        """`share` [B, L] without what repeats with the stride: its mean at each place of a period.

        What a sample shows of local attention is the same around each sampled row; what tokens
        receive from all rows repeats with no stride.
        """
        call, (batch, length) = self._writer.call, shape_of(share)
        periods = length // stride
        if stride == 1 or periods < PERIODS:
            return share
        whole = call(aten.slice.Tensor, share, 1, 0, periods * stride)
        places = call(aten.reshape.default, whole, [batch, periods, stride])
        mean = call(aten.mean.dim, places, [1])
        factor = call(
            aten.div.Tensor,
            call(aten.mean.dim, mean, [1], True),
            call(aten.clamp_min.default, mean, NOTHING),
        )
        factors = call(aten.repeat.default, factor, [1, periods + 1])
        return call(aten.mul.Tensor, share, call(aten.slice.Tensor, factors, 1, 0, length))

    def _stride(self, rows: int, of: int) -> int:
        """Where only some `rows` of all are computed, as large a share of them is sampled.

        So the sample takes no more of a step with few rows than of a dense one.
        """
        stride = -(-of // self._sample) if self._sample < of else 1
        if stride > 1:
            stride = even_stride(stride, self._plan.lengths)
        if rows < of:
            stride = min(stride, -(-rows // min(self._sample, FEWEST)))
        return stride

    def _sampled_rows(self, rows: int, of: int) -> range | fx.Node:
        """Evenly strided, from another row in each attention; a node if `before` is one."""
        stride = self._stride(rows, of)
        number, stop = self._observed, rows // stride * stride
        self._observed += 1
        if self.before is not None and stride > 1:
            return self._told_rows(self.before, number, stride, stop)
        start = number * GOLDEN % (1 << BITS) * stride >> BITS
        return range(start, start + stop, stride)

    def _told_rows(self, before: fx.Node, number: int, stride: int, stop: int) -> fx.Node:
        """The same rows, int64, where only a run knows how many attentions came before."""
        call = self._writer.call
        multiple = call(aten.mul.Scalar, call(aten.add.Scalar, before, number), GOLDEN)
        part = call(aten.bitwise_and.Scalar, multiple, (1 << BITS) - 1)
        scaled = call(aten.mul.Scalar, part, stride)
        start = call(aten.bitwise_right_shift.Tensor_Scalar, scaled, BITS)
        rows = call(aten.arange.start_step, 0, stop, stride, device=self._writer.device)
        return call(aten.add.Tensor, rows, start)

    def _masked(self, logits: fx.Node, mask: fx.Node, every: range | fx.Node) -> fx.Node:
        call = self._writer.call
        if rank_of(mask) > 1 and shape_of(mask)[-2] != 1:
            mask = _every(self._writer, mask, every)
        if mask.meta["val"].dtype is not torch.bool:
            return call(aten.add.Tensor, logits, mask)
        blocked = call(aten.logical_not.default, mask)
        return call(aten.masked_fill.Scalar, logits, blocked, float("-inf"))


def even_stride(least: int, lengths: Sequence[int]) -> int:
    """A stride, `least` or hardly more, whose rows lie evenly in pictures of so many tokens.

    Odd, for pictures are mostly of even width: an even stride would sample some of their columns
    only. One of a row more or less than the width would sample a few diagonals. As nothing tells
    the width, it is taken to be that of the most nearly square picture, upright or not.
    """
    odd = least | 1
    sides = [next(w for w in range(isqrt(n), 0, -1) if n % w == 0) for n in lengths]
    widths = {*sides, *(n // side for n, side in zip(lengths, sides, strict=True))}

    def evenness(stride: int) -> float:
        return min(APART, *(_nearest(stride, width) / stride for width in widths))

    return max(range(odd, odd + odd // 4 + 1, 2), key=evenness)


def _nearest(stride: int, width: int) -> int:
    """Least squared distance of two tokens of a picture of which every `stride`-th is taken."""
    found = stride * stride
    for down in range(1, isqrt(stride) + 1):
        across = width * down % stride
        found = min(found, down**2 + min(across, stride - across) ** 2)
    return found


def observed(plan: SelectivePlan) -> int:
    """Attentions that importance is taken from."""
    nodes = plan.axes.graph.find_nodes(op="call_function", target=ATTENTION)
    return sum(bool(_prunable_keys(plan, Attention.of(node))) for node in nodes)


def _prunable_keys(plan: SelectivePlan, found: Attention) -> list[Piece]:
    """The pieces of an attention's keys whose importance it tells.

    Causal attentions are left out: what a token receives there tells its position first.
    """
    rank, axes = rank_of(found.query), plan.axes
    if found.causal or rank < 3 or axes.batch_axis(found.query) != 0:
        return []
    layout = axes.layout(found.key, rank_of(found.key) - 2)
    return [piece for piece in layout if piece.segment in plan.prunable]


def _every(writer: GraphWriter, value: fx.Node, rows: range | fx.Node) -> fx.Node:
    axis = rank_of(value) - 2
    if isinstance(rows, fx.Node):
        return writer.call(aten.index_select.default, value, axis, rows)
    if rows.step == 1:
        return value
    return writer.call(aten.slice.Tensor, value, axis, rows.start, rows.stop, rows.step)
