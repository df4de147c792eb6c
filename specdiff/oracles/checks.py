"""The oracles: what the emitted programs must agree with, on any model (docs/design.md).

Each compares tensors that the mathematics says are equal and yields them in pairs, for a test to
assert and for `specdiff.verify` to measure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from specdiff.passes.emit.lower import BlockPrograms, LoweredPrograms
from specdiff.passes.graph.writer import STRIDED_VIEWS
from specdiff.passes.select.selection import Selection
from specdiff.pipeline import Analysis
from specdiff.program import Programs, share_out

aten = torch.ops.aten


@dataclass(frozen=True)
class BlockSelection:
    """A graph as one block of a model that is compiled block by block."""

    module: fx.GraphModule
    selection: Selection


@dataclass(frozen=True)
class Pair:
    """Two values that must be equal, and the oracle that says so."""

    oracle: str
    actual: Tensor
    expected: Tensor

    @property
    def error(self) -> float:
        """Largest difference over the largest magnitude expected; infinite where not finite."""
        if self.actual.shape != self.expected.shape:
            return float("inf")
        actual, expected = self.actual.double(), self.expected.double()
        if not (torch.isfinite(actual).all() and torch.isfinite(expected).all()):
            return float("inf")
        if not actual.numel():
            return 0.0
        scale = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        return float((actual - expected).abs().max() / scale)


def idempotence(
    analysis: Analysis, programs: Programs, inputs: Sequence[Any], active: Tensor
) -> Iterator[Pair]:
    """Oracle 1: after a dense step, a selective step on the same input changes nothing."""
    caches = _caches(analysis)
    dense = programs.dense(inputs, caches)
    before = stored_values(analysis.selection, [cache.clone() for cache in caches])
    selective = programs.selective(inputs, caches, active)
    yield Pair("idempotence", selective.tokens, pick(dense.tokens, active))
    for after, old in zip(stored_values(analysis.selection, caches), before, strict=True):
        yield Pair("idempotence", after, old)


def masked_dense(
    analysis: Analysis,
    programs: Programs,
    inputs: Sequence[Any],
    later: Sequence[Any],
    active: Tensor,
) -> Iterator[Pair]:
    """Oracle 2: on another input, inactive rows are exactly those of the caches.

    It runs the selective program that measures no importance; oracles 1 and 3 run the other one.
    """
    caches = _caches(analysis)
    programs.dense(inputs, caches)
    selective = programs.selective(later, caches, active, importance=False)
    first = MaskedDense(analysis, {}, active)
    first.run(*inputs)
    second = MaskedDense(analysis, first.values, active)
    second.run(*later)
    expected = as_tokens(analysis.selection, second.values)
    yield Pair("masked dense", selective.tokens, pick(expected, active))


def without_text(
    analysis: Analysis,
    programs: LoweredPrograms,
    inputs: Sequence[Any],
    later: Sequence[Any],
    active: Tensor,
) -> Iterator[Pair]:
    """Oracles 1 and 2 of a step that computes no text: rows of text, too, are those of the caches.

    Yields nothing for a model whose text cannot be left out.
    """
    for values, name, measured in (
        (inputs, "idempotence, text kept", True),
        (later, "masked dense, text kept", False),
    ):
        caches = _caches(analysis)
        programs.dense(inputs, caches)
        step = programs.selective(values, caches, active, text=False, importance=measured)
        if not programs.omits_text:
            return
        first = MaskedDense(analysis, {}, active)
        first.run(*inputs)
        second = MaskedDense(analysis, first.values, active, text=False)
        second.run(*values)
        yield Pair(name, step.tokens, pick(as_tokens(analysis.selection, second.values), active))
        # the caches also hold fixed values, after the cached ones
        for stored, node in zip(
            stored_values(analysis.selection, caches), analysis.selection.cached, strict=False
        ):
            expected = second.values[node.name].permute(analysis.selection.cache_order(node))
            yield Pair(name, stored, expected)


def of_block(
    block: BlockSelection, programs: BlockPrograms, inputs: Sequence[Any], later: Sequence[Any]
) -> Iterator[Pair]:
    """Oracles 1 to 3 of a block's own outputs; in `later` the tokens that it transforms differ."""
    selection, before = block.selection, torch.zeros(1, dtype=torch.int64)
    active = random_active(
        selection.axes.samples, selection.lengths, max(1, round(0.3 * selection.tokens))
    )
    every = torch.arange(selection.tokens).expand(selection.axes.samples, -1)
    caches = _filled(slot.allocate() for slot in programs.slots)
    device = caches[0].device
    active, every, before = active.to(device), every.to(device), before.to(device)

    def selective(values: Sequence[Any], rows: Tensor, measured: bool = True) -> list[Any]:
        programs.dense(inputs, caches, before)
        outputs: list[Any] = [
            *programs.selective(values, caches, rows, before if measured else None)
        ]
        if measured:
            outputs.pop()  # importance
        # an output is a cache, which the next run overwrites
        return [o.clone() if isinstance(o, Tensor) else o for o in outputs]

    first = MaskedDense(block, {}, active)
    whole = first.run(*inputs)
    masked = MaskedDense(block, first.values, active).run(*later)
    moved = MaskedDense(block, {}, active).run(*later)
    for name, results, expected in (
        ("dense", programs.dense(inputs, caches, before)[:-1], whole),
        ("idempotence", selective(inputs, active), whole),
        ("masked dense", selective(later, active, measured=False), masked),
        ("all active", selective(later, every), moved),
    ):
        for value, wanted in zip(results, expected, strict=True):
            if isinstance(value, Tensor):
                yield Pair(f"as a block of {selection.tokens}, {name}", value, wanted)


def all_active(
    analysis: Analysis,
    programs: Programs,
    inputs: Sequence[Any],
    later: Sequence[Any],
    outputs: Sequence[Any],
) -> Iterator[Pair]:
    """Oracle 3: with every token active the selective program is the model.

    `outputs` are the model's own for `later`; the dense program's are held to them too.
    """
    caches = _caches(analysis)
    programs.dense(inputs, caches)
    signature = analysis.signature
    every = torch.arange(signature.prunable_tokens, device=signature.tokens.device)
    active = every.expand(signature.batch, -1)
    selective = programs.selective(later, caches, active)
    dense = programs.dense(later, caches)
    for name, step in (("all active", selective), ("dense", dense)):
        for value, expected in zip(programs.tail(later, step.tokens), outputs, strict=True):
            if isinstance(value, Tensor):
                yield Pair(name, value, expected)


def random_active(batch: int, lengths: Sequence[int], count: int, device: Any = "cpu") -> Tensor:
    """A different ascending active set for each sample, int64 [batch, count]."""
    generator = torch.Generator().manual_seed(0)
    first, columns = 0, []
    for length, share in zip(lengths, share_out(lengths, count), strict=True):
        rows = [torch.randperm(length, generator=generator)[:share] for _ in range(batch)]
        columns.append(first + torch.stack(rows).sort(1).values)
        first += length
    return torch.cat(columns, 1).to(device)


def pick(tokens: Tensor, active: Tensor) -> Tensor:
    """Rows `active` [B, K] of `tokens` [B, N, C]."""
    return tokens.gather(1, active.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))


def as_tokens(selection: Selection, values: Mapping[str, Tensor]) -> Tensor:
    """The token-level outputs, found by their names among `values`, as one [B, N, C]."""
    parts = []
    for slot in selection.slots:
        batch, tokens = selection.axes.batch_axis(slot), selection.token_axis(slot)
        assert batch is not None and tokens is not None
        part = values[slot.name].movedim((batch, tokens), (0, 1)).flatten(2)
        parts.append(F.pad(part, (0, selection.channels - part.shape[2])))
    return torch.cat(parts, 1)


class MaskedDense(fx.Interpreter):
    """Computes every row of every op, then takes the cached row where a token is not active.

    Values that the caches store as codes are rounded to these, fresh rows too. `values` collects
    cached values and token-level outputs, or with `every` all values.
    """

    def __init__(
        self,
        analysis: Analysis | BlockSelection,
        cached: dict[str, Tensor],
        active: Tensor,
        every: bool = False,
        text: bool = True,
    ) -> None:
        super().__init__(analysis.module)
        self._text = text
        self._kept = None if every else {*analysis.selection.cached, *analysis.selection.slots}
        self._selection = analysis.selection
        self._cached = cached
        self._active = active
        self.values: dict[str, Tensor] = {}

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run one op; a value mixed with the cache has other strides than the traced value."""
        target = aten.reshape.default if target in STRIDED_VIEWS else target
        if target is aten.view_as_complex.default:
            args = (args[0].contiguous(),)
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """The node's value; if it lives in a cache, mixed with the cached rows."""
        value = super().run_node(n)
        if n in self._selection.cached and self._cached:
            fresh = fresh_rows(self._selection, n, self._active, self._text)
            value = torch.where(fresh, value, self._cached[n.name])
            value = coded(value, self._selection.codes.get(n))
        if self._kept is None or n in self._kept:
            self.values[n.name] = value
        return value


def coded(value: Tensor, code: torch.dtype | None) -> Tensor:
    """`value` rounded to codes of that dtype, one scale per row; without `code` unchanged."""
    if code is None:
        return value
    top = torch.finfo(code).max if code.is_floating_point else torch.iinfo(code).max
    scale = value.float().abs().amax(-1, keepdim=True) / top
    # a row of zeros divides by nothing
    codes = torch.where(scale > 0, value.float() / scale, 0.0)
    codes = codes if code.is_floating_point else codes.round()
    return (codes.to(code).float() * scale).to(value.dtype)


def stored_values(selection: Selection, caches: Iterable[Tensor]) -> list[Tensor]:
    """The values that the caches store, tables left out; codes times their scales."""
    pending, values = iter(caches), []
    for node in (*selection.cached, *selection.fixed):
        value = next(pending)
        if node in selection.codes:
            value = (value.float() * next(pending)).to(node.meta["val"].dtype)
        values.append(value)
    return values


def fresh_rows(selection: Selection, node: fx.Node, active: Tensor, text: bool = True) -> Tensor:
    """Boolean, broadcastable to `node`: the rows that a selective step computes."""
    axis, batch = selection.token_axis(node), selection.axes.batch_axis(node)
    assert axis is not None and batch is not None
    shape = node.meta["val"].shape
    mask = active.new_full((active.shape[0], shape[axis]), text, dtype=torch.bool)
    fresh = torch.zeros(active.shape[0], selection.tokens, dtype=torch.bool, device=active.device)
    fresh.scatter_(1, active, True)
    for piece in selection.layout(node):
        if piece.segment in selection.prunable:
            first = selection.first_token(piece.segment)
            mask[:, piece.offset : piece.offset + piece.length] = fresh[
                :, first : first + piece.length
            ]
    view = [1] * len(shape)
    view[batch], view[axis] = mask.shape
    return (mask if batch < axis else mask.T).reshape(view)


def _caches(analysis: Analysis) -> list[Tensor]:
    """Empty caches: a row that is read before it is written shows as nan."""
    return _filled(slot.allocate() for slot in analysis.signature.caches)


def _filled(caches: Iterable[Tensor]) -> list[Tensor]:
    return [c.fill_(torch.nan) if c.is_floating_point() else c for c in caches]
