"""What the compiler found in a model, without compiling or running anything selective."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from specdiff import torch_adapter
from specdiff.compiler import Analysis, attempt
from specdiff.options import Options
from specdiff.passes.cost import Sizes
from specdiff.passes.regions import Region, dense_work, selective_work
from specdiff.program import Segment


@dataclass(frozen=True)
class Report:
    """The verdict on one model and one set of input shapes."""

    selective: bool
    reason: str
    """Why the model runs dense; empty if it does not."""
    latents: tuple[str, ...] = ()
    """Inputs that are denoised, by their names in the caller's frame."""
    segments: tuple[Segment, ...] = ()
    regions: tuple[Region, ...] = ()
    cache_bytes: int = 0
    """Bytes of the caches of one generation."""
    whole: tuple[tuple[str, int], ...] = ()
    """Ops that mix tokens and therefore stay whole, with how often."""

    sizes: Sizes | None = None
    """What the symbols of costs stand for."""

    def step_flops(self, active: int | None = None) -> int:
        """FLOPs of a dense step, or of a selective one with `active` tokens."""
        if self.sizes is None:
            return 0
        work = dense_work(self.regions) if active is None else selective_work(self.regions)
        return int(self.sizes.evaluate(work.flops, active))

    def __str__(self) -> str:
        """A page for a person."""
        if not self.selective:
            return f"dense: {self.reason}"
        lines = ["selective", f"denoises: {', '.join(self.latents)}", "segments:"]
        for segment in self.segments:
            kind = "prunable" if segment.prunable else "always computed"
            lines.append(f"  {segment.name}: {segment.length} tokens, {kind}")
        kinds = Counter(region.kind for region in self.regions)
        lines.append("regions: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
        lines.append(f"caches: {self.cache_bytes / 2**20:.1f} MiB a generation")
        lines.append(f"dense step: {self.step_flops() / 1e9:.2f} GFLOP")
        tokens = sum(s.length for s in self.segments if s.prunable)
        for ratio in (0.5, 0.75, 0.9, 0.95):
            active = round((1 - ratio) * tokens)
            gain = self.step_flops() / self.step_flops(active)
            lines.append(f"  {ratio:.0%} cached: a selective step has {gain:.1f}x fewer FLOPs")
        if self.whole:
            lines.append("whole: " + ", ".join(f"{n} {op}" for op, n in self.whole))
        return "\n".join(lines)


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Report:
    """Trace `model` on these inputs and report what would be skipped.

    The model runs once, eagerly. Models that break into several graphs are reported by their
    first graph that has attention, or else by their first.
    """
    reports: list[Report] = []

    def collect(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        found = attempt(module, inputs, Options())
        reports.append(report_of(found))
        return module.forward

    with torch.no_grad():
        torch_adapter.trace_once(getattr(model, "_orig_mod", model), collect, args, kwargs)
    if not reports:
        return Report(False, "the model was not traced: Dynamo found no tensor operation")
    return next((report for report in reports if report.selective), reports[0])


def report_of(found: Analysis | str) -> Report:
    """What `explain` says of one graph, given its analysis or why it has none."""
    if isinstance(found, str):
        return Report(False, found)
    if found.signature.time is None:
        return Report(False, "no time input was found: name it by the option timestep_arg")
    return Report(
        selective=True,
        reason="",
        latents=tuple(
            found.signature.inputs[pair.latent].name for pair in found.signature.denoised
        ),
        segments=found.signature.segments,
        regions=found.regions,
        cache_bytes=found.signature.cache_bytes,
        whole=_mixing_ops(found),
        sizes=Sizes.of(found.plan),
    )


def _mixing_ops(found: Analysis) -> tuple[tuple[str, int], ...]:
    """Ops on whole prunable tokens that the selective program still runs, tables left out."""
    plan = found.plan
    ops = Counter(
        str(node.target)
        for node in plan.axes.graph.nodes
        if node.op == "call_function"
        and node in plan.whole
        and node not in plan.cached
        and node in plan.attention_dependent
        and any(plan.carries(operand) for operand in node.all_input_nodes)
        and plan.extracted_from(node) is None
    )
    return tuple(ops.most_common())
