"""The oracles of the design: what the emitted programs must agree with, on any model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from specdiff import torch_adapter
from specdiff.compiler import ALL_QUERIES, Analysis, analyse
from specdiff.options import Options
from specdiff.passes.lower import LoweredPrograms
from specdiff.passes.selective import SelectivePlan


@dataclass
class Traced:
    """One traced model: its analysis, and the flat inputs of each call it was traced with."""

    analysis: Analysis
    flat: list[Sequence[Any]]

    def programs(self, inner_backend: str = "eager") -> LoweredPrograms:
        """Fresh programs of the analysis."""

        def compiler(name: str, module: fx.GraphModule, values: Sequence[Any]) -> Any:
            return torch_adapter.compile_program(module, values, inner_backend, {})

        found = self.analysis
        return LoweredPrograms(found.module, found.plan, found.signature, ALL_QUERIES, compiler)


def trace(model: nn.Module, *calls: dict[str, Any]) -> Traced:
    """Trace `model` once through Dynamo and every pass, each verified; run every call."""
    analyses: list[Analysis] = []
    flat: list[Sequence[Any]] = []

    def backend(module: fx.GraphModule, values: Sequence[Any]) -> Callable[..., Any]:
        analyses.append(analyse(module, values, Options(), verify=True))

        def run(*arguments: Any) -> Any:
            flat.append(arguments)
            return module(*arguments)

        return run

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for call in calls:
            compiled(**call)
    assert len(analyses) == 1
    return Traced(analyses[0], flat)


def random_active(batch: int, tokens: int, count: int, seed: int = 0) -> Tensor:
    """A different ascending active set for each sample, int64 [batch, count]."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(tokens, generator=generator)[:count].sort().values for _ in range(batch)]
    return torch.stack(rows)


def pick(tokens: Tensor, active: Tensor) -> Tensor:
    """Rows `active` [B, K] of `tokens` [B, N, C]."""
    return tokens.gather(1, active.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))


class MaskedDense(fx.Interpreter):
    """Computes every row of every op, then keeps the cached row where a token is not active."""

    def __init__(self, analysis: Analysis, cached: dict[str, Tensor], active: Tensor) -> None:
        super().__init__(analysis.module)
        self._plan = analysis.plan
        self._cached = cached
        self._active = active
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The node's value, mixed with the cache where the plan keeps it in one."""
        value = super().run_node(n)
        if n in self._plan.cached and self._cached:
            fresh = fresh_rows(self._plan, n, self._active)
            value = torch.where(fresh, value, self._cached[n.name])
        self.values[n.name] = value
        return value


def fresh_rows(plan: SelectivePlan, node: fx.Node, active: Tensor) -> Tensor:
    """Boolean, broadcastable to `node`: which of its rows a selective step computes."""
    axis, batch = plan.token_axis(node), plan.axes.batch_axis(node)
    assert axis is not None and batch is not None
    shape = node.meta["val"].shape
    mask = torch.ones(active.shape[0], shape[axis], dtype=torch.bool)
    for piece in plan.layout(node):
        if piece.segment == plan.prunable:
            mask[:, piece.offset : piece.offset + piece.length] = False
            mask.scatter_(1, active + piece.offset, True)
    view = [1] * len(shape)
    view[batch], view[axis] = mask.shape
    return (mask if batch < axis else mask.T).reshape(view)
