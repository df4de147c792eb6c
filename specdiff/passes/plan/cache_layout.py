"""Kept: the tensors in which a value lies between steps: itself, or 8-bit codes and their scales.

A code times its scale is the value, to one part in 254 (int8) or 28 (float8) of the largest
magnitude of its row: of one token in one head. Rows are coded one by one, so that a selective step
rewrites those of active tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from specdiff.passes.graph.writer import GraphWriter
from specdiff.passes.plan.selective_plan import SelectivePlan
from specdiff.passes.rules.registry import shape_of
from specdiff.program import TIMES_AT_ONCE

aten = torch.ops.aten
SCALE = torch.float32
"""What scales are kept in."""


@dataclass(frozen=True)
class KeptTensor:
    """One tensor of what a plan keeps."""

    suffix: str
    """Tells it from the other tensors of its value."""
    shape: tuple[int, ...]
    dtype: torch.dtype


def kept_tensors(plan: SelectivePlan) -> dict[fx.Node, tuple[KeptTensor, ...]]:
    """What a plan keeps between steps: caches, values that no step changes, tables by time."""
    caches = {node: _cache(plan, node) for node in plan.cached}
    fixed = {n: (KeptTensor("", shape_of(n), n.meta["val"].dtype),) for n in plan.fixed}
    tables = {
        n: (KeptTensor("", (TIMES_AT_ONCE, *shape_of(n)), n.meta["val"].dtype),)
        for n in plan.tabulated
    }
    return caches | fixed | tables


def _cache(plan: SelectivePlan, node: fx.Node) -> tuple[KeptTensor, ...]:
    shape, code = plan.cache_shape(node), plan.codes.get(node)
    if code is None:
        return (KeptTensor("", shape, node.meta["val"].dtype),)
    return KeptTensor("", shape, code), KeptTensor("_scale", (*shape[:-1], 1), SCALE)


def encode(writer: GraphWriter, value: fx.Node, code: torch.dtype | None) -> tuple[fx.Node, ...]:
    """The tensors to keep of a value; without `code` the value itself."""
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


def decode(writer: GraphWriter, kept: Sequence[fx.Node], dtype: torch.dtype) -> fx.Node:
    """The value, in its own dtype, of the tensors that are kept of it."""
    if len(kept) == 1:
        return kept[0]
    call = writer.call
    codes, scale = kept
    exact = call(aten.mul.Tensor, call(aten._to_copy.default, codes, dtype=SCALE), scale)
    return exact if dtype is SCALE else call(aten._to_copy.default, exact, dtype=dtype)


def largest_code(code: torch.dtype) -> float:
    """What the largest magnitude of a row becomes."""
    return torch.finfo(code).max if code.is_floating_point else torch.iinfo(code).max
