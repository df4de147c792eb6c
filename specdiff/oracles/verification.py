"""`specdiff.verify`: the oracles on a user's own model and inputs.

A gate before a model goes live: every graph of it is traced, rewritten and held to oracles 1 to 3,
in the model's own dtype and on its own device; the programs run eagerly. A graph without a time or
a selective form is held to them as a block, since `specdiff.attach` may use it as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from specdiff import torch_adapter
from specdiff.compiler import ALL_QUERIES, lowered_programs, program_compiler
from specdiff.inspect.publish import publish
from specdiff.inspect.report import Report, report_of
from specdiff.options import Options
from specdiff.oracles.checks import (
    BlockSelection,
    Pair,
    all_active,
    idempotence,
    masked_dense,
    of_block,
    random_active,
    without_text,
)
from specdiff.passes.emit.lower import BlockPrograms
from specdiff.passes.select.block import select_block
from specdiff.passes.select.quantize import quantized
from specdiff.pipeline import Analysis, module_states, or_reason, trace, trace_and_analyse

TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
"""Largest accepted error, relative to the largest magnitude, by dtype of the model's output: as
large as that of sums in another order, some layers deep."""
CODED_TOLERANCES: Mapping[str | None, float] = {None: 0.0, "int8": 3e-2, "fp8_e4m3": 1e-1}
"""Least tolerance by `kv_cache_dtype`, where caches hold codes."""
ACTIVE_SHARE = 0.3
EXACT = Options(inner_backend="eager", ablation={"importance_queries": None})
"""All query rows measure importance, so that it does not depend on which rows are computed."""


@dataclass(frozen=True)
class GraphVerdict:
    """One graph of the model: its report, and the largest relative error by oracle."""

    report: Report
    errors: Mapping[str, float]
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether no error exceeds the tolerance; a graph that runs dense always passes."""
        return all(error <= self.tolerance for error in self.errors.values())

    def __str__(self) -> str:
        """A few lines for a person."""
        lines = [str(self.report)]
        for oracle, error in self.errors.items():
            verdict = "ok" if error <= self.tolerance else f"FAILED (at most {self.tolerance:.0e})"
            lines.append(f"{oracle}: error {error:.1e} {verdict}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Verification:
    """The verdict on a model: all of its graphs, in the order in which they ran."""

    graphs: tuple[GraphVerdict, ...]

    @property
    def passed(self) -> bool:
        """Whether no graph disagrees with an oracle."""
        return all(graph.passed for graph in self.graphs)

    @property
    def selective(self) -> bool:
        """Whether any graph of the model was rewritten."""
        return any(graph.report.selective for graph in self.graphs)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why graphs run dense, each reason once."""
        return tuple(dict.fromkeys(g.report.reason for g in self.graphs if g.report.reason))

    @property
    def max_error(self) -> float:
        """Largest relative error of any oracle on any graph."""
        return max((e for g in self.graphs for e in g.errors.values()), default=0.0)

    def __str__(self) -> str:
        """A page for a person."""
        head = "passed" if self.passed else "FAILED"
        texts = [str(graph) for graph in self.graphs]
        if len(texts) > 1:
            texts = [f"graph {i}: {text}" for i, text in enumerate(texts)]
        return "\n".join([head, *texts])


def verify(
    model: nn.Module,
    *args: Any,
    tolerance: float | None = None,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Verification:
    """Run `model` once on these inputs, and oracles 1 to 3 on each of its graphs.

    Oracles 2 and 3 also run on the inputs of a later step: the latent moved by a third of its
    standard deviation. Needs memory for two sets of caches.

    Args:
        model: the model, compiled or not.
        args: its inputs, and `kwargs` those by name.
        tolerance: largest accepted error relative to the largest magnitude of a value; None: by
            the dtype of the output (`TOLERANCES`).
        options: as of `torch.compile(options=...)`; a mapping, as keywords are the model's inputs.
            With `kv_cache_dtype` the error of oracle 1 is what the codes cost.
        kwargs: inputs by name.

    Raises:
        OptionError: An unknown option or a value out of range.
    """
    known, _ = Options.parse(dict(options or {}), torch_adapter.inductor_keys())
    verdicts: list[GraphVerdict] = []

    def backend(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        analysis = trace_and_analyse(module, inputs, known, verify=True, publish=publish)
        alone = isinstance(analysis, Analysis) and analysis.signature.time is not None
        blocks = [] if alone else _blocks(module, inputs, known)

        def run(*values: Any) -> Any:
            pairs = _every_pair(module, analysis, blocks, torch_adapter.as_plain(values))
            verdicts.append(_verdict(analysis, pairs, known, tolerance))
            return module(*values)

        return run

    with torch.no_grad():
        torch_adapter.trace_once(getattr(model, "_orig_mod", model), backend, args, kwargs)
    return Verification(tuple(verdicts))


def _blocks(
    module: fx.GraphModule, inputs: Sequence[Any], options: Options
) -> list[BlockSelection]:
    """The selections that a root may use a graph with: one for each length of a segment."""
    is_state = module_states(module, inputs)
    traced = or_reason(lambda: trace(module, inputs, Options()))
    if isinstance(traced, str):
        return []
    axes = traced.axes
    sizes = sorted({axes.classes.size(segment) for segment in axes.segments})
    plans = [or_reason(partial(select_block, axes, size, is_state)) for size in sizes]
    code = options.kv_cache_code
    return [
        BlockSelection(traced.module, quantized(p, code)) for p in plans if not isinstance(p, str)
    ]


def _every_pair(
    module: fx.GraphModule,
    analysis: Analysis | str,
    blocks: Sequence[BlockSelection],
    inputs: Sequence[Any],
) -> Iterator[Pair]:
    yield from chain.from_iterable(_block_pairs(block, inputs) for block in blocks)
    if not isinstance(analysis, str):
        yield from _pairs(module, analysis, inputs)


def _verdict(
    analysis: Analysis | str, pairs: Iterable[Pair], options: Options, tolerance: float | None
) -> GraphVerdict:
    errors: dict[str, float] = {}
    dtype = torch.float32
    for pair in pairs:
        errors[pair.oracle] = max(errors.get(pair.oracle, 0.0), pair.error)
        dtype = pair.expected.dtype
    if tolerance is None:
        dtype = dtype if isinstance(analysis, str) else analysis.signature.tokens.dtype
        of_dtype = TOLERANCES.get(dtype, TOLERANCES[torch.float32])
        tolerance = max(of_dtype, CODED_TOLERANCES[options.kv_cache_dtype])
    return GraphVerdict(report_of(analysis, options), errors, tolerance)


def _block_pairs(block: BlockSelection, inputs: Sequence[Any]) -> Iterator[Pair]:
    options = Options(inner_backend="eager")
    compiler = program_compiler(None, options, {})
    programs = BlockPrograms(block.module, block.selection, ALL_QUERIES, compiler)
    placeholders = block.module.graph.find_nodes(op="placeholder")
    later = list(inputs)
    for index, node in enumerate(placeholders):
        if node in block.selection.stale and later[index].is_floating_point():
            later = _later(later, index)
    yield from of_block(block, programs, inputs, later)


def _pairs(module: fx.GraphModule, analysis: Analysis, inputs: Sequence[Any]) -> Iterator[Pair]:
    programs = lowered_programs(analysis, EXACT, {})
    signature = analysis.signature
    count = max(len(signature.lengths), round(ACTIVE_SHARE * signature.prunable_tokens))
    device = signature.tokens.device
    active = random_active(signature.batch, signature.lengths, count, device)
    later = _later(inputs, signature.latent)
    outputs = module(*later)
    yield from idempotence(analysis, programs, inputs, active)
    yield from masked_dense(analysis, programs, inputs, later, active)
    yield from without_text(analysis, programs, inputs, later, active)
    yield from all_active(analysis, programs, inputs, later, outputs)


def _later(inputs: Sequence[Any], latent: int) -> list[Any]:
    moved = list(inputs)
    value: Tensor = inputs[latent]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(value.shape, generator=generator).to(value)
    moved[latent] = value + noise * value.float().std().to(value.dtype) / 3
    return moved
