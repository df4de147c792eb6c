"""Cache layout: the tensors that hold a value between steps: itself, or 8-bit codes and scales.

value = code * scale, exact to one part in 254 (int8) or 28 (float8) of the largest magnitude in a
row, which is one token in one head. Each row has its own scale, so a selective step can rewrite the
rows of active tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from specdiff.passes.graph.writer import GraphWriter
from specdiff.passes.rules.registry import shape_of
from specdiff.passes.select.selection import Selection
from specdiff.program import TIMES_AT_ONCE

aten = torch.ops.aten
SCALE = torch.float32
"""The dtype of scales."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor that lives from step to step."""

    suffix: str
    """Distinguishes the tensors of one value."""
    shape: tuple[int, ...]
    dtype: torch.dtype


def stored_tensors(selection: Selection) -> dict[fx.Node, tuple[StoredTensor, ...]]:
    """All tensors that live from step to step: caches, fixed values, tables by time."""
    caches = {node: _cache(selection, node) for node in selection.cached}
    fixed = {n: (StoredTensor("", shape_of(n), n.meta["val"].dtype),) for n in selection.fixed}
    tables = {
        n: (StoredTensor("", (TIMES_AT_ONCE, *shape_of(n)), n.meta["val"].dtype),)
        for n in selection.tabulated
    }
    return caches | fixed | tables


def _cache(selection: Selection, node: fx.Node) -> tuple[StoredTensor, ...]:
    shape, code = selection.cache_shape(node), selection.codes.get(node)
    if code is None:
        return (StoredTensor("", shape, node.meta["val"].dtype),)
    return StoredTensor("", shape, code), StoredTensor("_scale", (*shape[:-1], 1), SCALE)


def encode(writer: GraphWriter, value: fx.Node, code: torch.dtype | None) -> tuple[fx.Node, ...]:
    """The tensors that store a value: codes and scales, or without `code` the value itself."""
    if code is None:
        return (value,)
    call = writer.call
    exact = call(aten._to_copy.default, value, dtype=SCALE)
    largest = call(aten.amax.default, call(aten.abs.default, exact), [-1], True)
    scale = call(aten.div.Tensor, largest, largest_code(code))
    # a row of zeros has codes of zero, whatever its scale
    scale = call(aten.clamp_min.default, scale, torch.finfo(SCALE).tiny)
    codes = call(aten.div.Tensor, exact, scale)
    if not code.is_floating_point:
        codes = call(aten.round.default, codes)
    return call(aten._to_copy.default, codes, dtype=code), scale


def decode(writer: GraphWriter, stored: Sequence[fx.Node], dtype: torch.dtype) -> fx.Node:
    """The value, in its own dtype, from the tensors that store it."""
    if len(stored) == 1:
        return stored[0]
    call = writer.call
    codes, scale = stored
    exact = call(aten.mul.Tensor, call(aten._to_copy.default, codes, dtype=SCALE), scale)
    return exact if dtype is SCALE else call(aten._to_copy.default, exact, dtype=dtype)


def largest_code(code: torch.dtype) -> float:
    """The code of a row's largest magnitude."""
    return torch.finfo(code).max if code.is_floating_point else torch.iinfo(code).max
