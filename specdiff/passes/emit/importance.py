"""Importance: how much attention each prunable token receives, from a strided sample of queries.

    importance[j] = sum over attentions and heads of the mean over sampled i of softmax(q_i k^T)[j]

in float32 (the paper's equation 1, which takes all queries). Of each N x N attention map at most
`sample` rows are computed.

Attention is mostly local, so tokens near a sampled query seem more important. As the sample is
strided, this error repeats with the stride; `_levelled` divides it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
from torch import fx

from specdiff.passes.graph.writer import GraphWriter
from specdiff.passes.rules.attention import ATTENTION, Attention
from specdiff.passes.rules.registry import rank_of, shape_of
from specdiff.passes.select.axes import ClassId, Piece
from specdiff.passes.select.selection import Selection

aten = torch.ops.aten
BITS, GOLDEN = 16, 40503
"""Multiples of GOLDEN / 2^BITS, modulo 1, fill the interval 0 to 1 evenly, however many there are.
They are integers so that a program that gets its first number at run time finds the same rows."""

PERIODS = 8
"""Least number of strides in a segment for their average to show what repeats."""
NOTHING = 1e-30
"""Least attention to divide by."""
APART = 0.25
"""Evenness of a sample that is good enough: the least squared distance of two sampled tokens in a
picture over their stride s. A sample along a diagonal has 2 / s."""
FEWEST = 8
"""Least number of sampled rows of an attention that computes as many, if `sample` allows."""


class ImportanceSum:
    """The sum over the attentions of one program."""

    def __init__(self, writer: GraphWriter, selection: Selection, sample: int) -> None:
        self.before: fx.Node | None = None
        """int64 [1], an input: the model's attentions before this program. None: there are none."""
        self._writer = writer
        self._selection = selection
        self._sample = sample
        self._totals: dict[ClassId, fx.Node] = {}
        self._observed = 0

    def observe(
        self, attention: Attention, query: fx.Node, key: fx.Node, mask: fx.Node | None
    ) -> None:
        """Add one attention, given its emitted operands; the query may be rows."""
        pieces = _prunable_keys(self._selection, attention)
        if not pieces or not self._sample:
            return
        call = self._writer.call
        rows, every_row = shape_of(query)[-2], shape_of(attention.query)[-2]
        sample = self._sampled_rows(rows, every_row)
        received = self._received(attention, query, key, mask, sample)
        strided = rows == every_row == shape_of(key)[-2]
        for piece in pieces:
            share = call(aten.slice.Tensor, received, 1, piece.offset, piece.offset + piece.length)
            if strided:
                share = self._levelled(share, self._stride(rows, every_row))
            total = self._totals.get(piece.segment)
            if total is None:
                # start from zeros, so that the first block has the same ops as all others
                total = call(aten.zeros_like.default, share)
            self._totals[piece.segment] = call(aten.add.Tensor, total, share)

    def result(self) -> fx.Node:
        """float32 [B, N]; ones for segments that no attention reads as keys."""
        batch = self._selection.axes.samples
        call, device = self._writer.call, self._writer.device
        shares = [
            self._totals[segment]
            if segment in self._totals
            else call(aten.ones.default, [batch, length], dtype=torch.float32, device=device)
            for segment, length in zip(
                self._selection.prunable, self._selection.lengths, strict=True
            )
        ]
        return shares[0] if len(shares) == 1 else call(aten.cat.default, shares, 1)

    def _received(
        self,
        attention: Attention,
        query: fx.Node,
        key: fx.Node,
        mask: fx.Node | None,
        every: range | fx.Node,
    ) -> fx.Node:
        """float32 [B, S]: the attention that each key receives from the rows `every`."""
        call = self._writer.call
        # scale the query rather than the logits, which are more values
        sampled = call(aten.mul.Tensor, _every(self._writer, query, every), attention.scale)
        if attention.grouped:
            groups = shape_of(query)[-3] // shape_of(key)[-3]
            key = call(aten.repeat_interleave.self_int, key, groups, rank_of(key) - 3)
        logits = call(aten.matmul.default, sampled, call(aten.transpose.int, key, -2, -1))
        if mask is not None:
            logits = self._masked(logits, mask, every)
        # a query that may attend to nothing gives zeros, not nan
        softmax = aten.softmax.int if mask is None else aten._safe_softmax.default
        weights = call(softmax, logits, -1, torch.float32)
        heads = list(range(1, rank_of(weights) - 2))
        # a mean over queries, so that steps with many and with few queries compare
        mean = call(aten.mean.dim, weights, [rank_of(weights) - 2])
        return call(aten.sum.dim_IntList, mean, heads) if heads else mean

    def _levelled(self, share: fx.Node, stride: int) -> fx.Node:
        """`share` [B, L] divided by its mean at each position modulo the stride.

        Around each sampled row local attention looks the same, so it repeats with the stride; what
        tokens receive from all rows does not.
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
        """The stride of the sample, where `rows` of the attention's `of` rows are computed.

        The same share of rows is sampled in every step, so that measuring costs a step with few
        rows no more than its share; but at least `FEWEST` rows.
        """
        stride = -(-of // self._sample) if self._sample < of else 1
        if stride > 1:
            stride = even_stride(stride, self._selection.lengths)
        if rows < of:
            stride = min(stride, -(-rows // min(self._sample, FEWEST)))
        return stride

    def _sampled_rows(self, rows: int, of: int) -> range | fx.Node:
        """The sampled rows: strided, with another first row in each attention."""
        stride = self._stride(rows, of)
        number, stop = self._observed, rows // stride * stride
        self._observed += 1
        if self.before is not None and stride > 1:
            return self._rows_at_run_time(self.before, number, stride, stop)
        start = number * GOLDEN % (1 << BITS) * stride >> BITS
        return range(start, start + stop, stride)

    def _rows_at_run_time(self, before: fx.Node, number: int, stride: int, stop: int) -> fx.Node:
        """The same rows as a value, int64: `before` is known at run time only."""
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
    """A stride, `least` or slightly more, whose rows lie evenly in pictures with so many tokens.

    It is odd: pictures are mostly of even width, and an even stride would miss half of the columns.
    A stride close to the width would sample a few diagonals only. The width is not known; it is
    taken to be that of the most nearly square picture, upright or lying.
    """
    odd = least | 1
    sides = [next(w for w in range(isqrt(n), 0, -1) if n % w == 0) for n in lengths]
    widths = {*sides, *(n // side for n, side in zip(lengths, sides, strict=True))}

    def evenness(stride: int) -> float:
        return min(APART, *(_nearest(stride, width) / stride for width in widths))

    return max(range(odd, odd + odd // 4 + 1, 2), key=evenness)


def _nearest(stride: int, width: int) -> int:
    """Least squared distance of two sampled tokens in a picture of this width."""
    least = stride * stride
    for down in range(1, isqrt(stride) + 1):
        across = width * down % stride
        least = min(least, down**2 + min(across, stride - across) ** 2)
    return least


def observed(selection: Selection) -> int:
    """Number of attentions that importance is measured from."""
    nodes = selection.axes.graph.find_nodes(op="call_function", target=ATTENTION)
    return sum(bool(_prunable_keys(selection, Attention.of(node))) for node in nodes)


def _prunable_keys(selection: Selection, attention: Attention) -> list[Piece]:
    """The pieces of an attention's keys that gain importance from it.

    A causal attention has none: there, what a token receives depends on its position first.
    """
    query, key, axes = attention.query, attention.key, selection.axes
    if attention.causal or rank_of(query) < 3 or axes.batch_axis(query) != 0:
        return []
    layout = axes.layout(key, rank_of(key) - 2)
    return [piece for piece in layout if piece.segment in selection.prunable]


def _every(writer: GraphWriter, value: fx.Node, rows: range | fx.Node) -> fx.Node:
    axis = rank_of(value) - 2
    if isinstance(rows, fx.Node):
        return writer.call(aten.index_select.default, value, axis, rows)
    if rows.step == 1:
        return value
    return writer.call(aten.slice.Tensor, value, axis, rows.start, rows.stop, rows.step)
