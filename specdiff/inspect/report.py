"""Report: what the compiler finds in a model; nothing is compiled for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy
from torch import fx

from specdiff.measure.machine import MachineRates
from specdiff.options import Options
from specdiff.passes.base import PassRecord
from specdiff.passes.graph.python_file import op_name
from specdiff.passes.select.cost import CostModel, Sizes, Work
from specdiff.passes.select.quantize import uncoded
from specdiff.passes.select.regions import Region, dense_work, selective_work
from specdiff.passes.select.selection import Selection
from specdiff.passes.select.signature import module_path
from specdiff.pipeline import Analysis
from specdiff.program import Segment, Signature
from specdiff.runtime.records.stats import in_words
from specdiff.runtime.streams.stream import kept_bytes
from specdiff.runtime.tokens.schedule import Place, Schedule, active_tokens
from specdiff.settings import Settings

NO_TIME = "no time input was found: name it by the option timestep_arg"
RATIOS = (0.5, 0.75, 0.9, 0.95)
"""Shares of tokens left out for which costs are shown."""
FORECAST_PASSES = 5
"""How often a skipped step reads or writes the token-level output: it reads two, writes their
extrapolation, and the tail reads and copies that."""


@dataclass(frozen=True)
class WholeOp:
    """Ops of one kind that a selective step computes for all image tokens."""

    op: str
    count: int
    why: str
    where: str
    """Module path of the first."""


@dataclass(frozen=True)
class TimeBounds:
    """Lower bounds for the times of steps, by the rates of a machine."""

    dense: float
    """Seconds of a dense step."""
    selective: float | None
    """Seconds of a selective step, if the schedule has any."""
    skipped: float
    """Seconds of a step that is forecast whole."""
    run: float
    """Seconds of a generation by the schedule, look-ahead included."""
    dense_run: float
    """Seconds of a generation whose steps are all dense."""

    @property
    def speedup(self) -> float:
        """Of a generation by the schedule, over a dense one."""
        return self.dense_run / self.run


@dataclass(frozen=True)
class Report:
    """The verdict on one model and one set of input shapes."""

    selective: bool
    reason: str
    """Why no tokens can be selected; empty if they can."""
    no_step_plan: str | None = None
    """Why no whole steps can be forecast; empty if they can, None if nobody looked."""
    kept_bytes: int = 0
    """Bytes that a step plan keeps of one generation at most, caches apart."""
    latents: tuple[str, ...] = ()
    """Inputs that are denoised, by their names in the caller's frame."""
    segments: tuple[Segment, ...] = ()
    regions: tuple[Region, ...] = ()
    cache_bytes: int = 0
    """Bytes of the caches of one generation."""
    uncoded: Mapping[str, int] = field(default_factory=dict)
    """Caches that keep the model's dtype in spite of `kv_cache_dtype`, counted by reason."""
    whole: tuple[WholeOp, ...] = ()
    """Ops that mix tokens and therefore stay whole."""
    sizes: Sizes = field(default_factory=lambda: Sizes(0, 0, 0))
    """What B, N and T stand for."""
    passes: tuple[PassRecord, ...] = ()
    settings: Settings = field(default_factory=lambda: Options().resolve())
    """The settings that the schedule follows."""
    analysis: Analysis | None = field(default=None, repr=False)
    """The source of the drawings."""

    @property
    def dense_work(self) -> Work:
        """Cost of a dense step, in B, N and T."""
        return dense_work(self.regions)

    @property
    def selective_work(self) -> Work:
        """Cost of a selective step, in B, N, K and T."""
        return selective_work(self.regions)

    @property
    def cache_formula(self) -> sympy.Expr:
        """Bytes of the caches of one generation, in B, N and T: `cache_bytes` at these sizes."""
        assert self.analysis is not None, self.reason
        selection = self.analysis.selection
        return CostModel(selection).caches((*selection.cached, *selection.known))

    @property
    def speedup(self) -> sympy.Expr:
        """How many times fewer FLOPs a selective step has, in B, N, K and T."""
        return sympy.cancel(self.dense_work.flops / self.selective_work.flops)

    def step_flops(self, active: int | None = None) -> int:
        """FLOPs of a dense step, or of a selective one with `active` tokens."""
        work = self.dense_work if active is None else self.selective_work
        return int(self.sizes.evaluate(work.flops, active))

    def active_at(self, ratio: float) -> int:
        """Tokens that a selective step computes if this share is left out."""
        return active_tokens(self.sizes.tokens, ratio)

    def schedule(self, steps: int) -> list[tuple[str, int, str]]:
        """Kind, tokens computed and reason of each step of a generation."""
        lengths = [segment.length for segment in self.segments if segment.prunable]
        schedule = Schedule.of(self.settings, lengths)
        planned = []
        for index in range(steps):
            count, reason = schedule.decide(Place.known(index, steps))
            kind = "dense" if count == schedule.tokens else "selective" if count else "skipped"
            planned.append((kind, count, reason))
        return planned

    def predict(self, rates: MachineRates, steps: int) -> TimeBounds:
        """Lower bounds for the times of each program and of a generation.

        Each region takes the longer of its arithmetic and its memory traffic. Overlap between
        regions and losses of real kernels are not counted.
        """
        assert self.analysis is not None, self.reason
        tokens = self.analysis.signature.tokens
        skipped = rates.seconds(0, FORECAST_PASSES * tokens.nbytes)
        dense = self.step_seconds(rates, None)
        planned = self.schedule(steps)
        counts = {count for kind, count, _ in planned if kind == "selective"}
        partial = {count: self.step_seconds(rates, count) for count in counts}
        seconds = {self.sizes.tokens: dense, 0: skipped, **partial}
        ahead = max(self.settings.plan.lookahead - 1, 0) * dense if partial else 0.0
        run = sum(seconds[count] for _, count, _ in planned) + ahead
        return TimeBounds(dense, next(iter(partial.values()), None), skipped, run, steps * dense)

    def step_seconds(self, rates: MachineRates, active: int | None) -> float:
        """Least time of a dense step, or of a selective one with `active` tokens."""
        evaluate = self.sizes.evaluate
        works = (r.dense_work if active is None else r.selective_work for r in self.regions)
        return sum(
            rates.seconds(evaluate(work.flops, active), evaluate(work.moved, active))
            for work in works
        )

    @property
    def _kept(self) -> str:
        size = f"{self.kept_bytes / 2**20:.1f} MiB"
        return f", keeps at most {size} a generation" if self.kept_bytes else ""

    def __str__(self) -> str:
        """A page for a person."""
        lines = [
            f"step plan: {in_words(self.no_step_plan)}{self._kept}",
            f"token selection: {in_words(self.reason)}",
        ]
        if not self.selective:
            return "\n".join(lines)
        lines += [f"denoises: {', '.join(self.latents)}", "segments:"]
        for segment in self.segments:
            kind = "prunable" if segment.prunable else "always computed"
            lines.append(f"  {segment.name}: {segment.length} tokens, {kind}")
        kinds = Counter(region.kind for region in self.regions)
        lines.append("regions: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
        mebibytes = f"{self.cache_bytes / 2**20:.1f} MiB"
        lines.append(f"caches: {mebibytes} a generation, {self.cache_formula} bytes")
        lines += [f"  {n} in the model's dtype: {why}" for why, n in self.uncoded.items()]
        lines.append(f"dense step: {self.step_flops() / 1e9:.2f} GFLOP")
        for ratio in RATIOS:
            gain = self.step_flops() / self.step_flops(self.active_at(ratio))
            lines.append(f"  {ratio:.0%} cached: a selective step has {gain:.1f}x fewer FLOPs")
        if self.whole:
            lines.append("whole:")
            lines += [f"  {w.count} {w.op} from {w.where or '-'}: {w.why}" for w in self.whole]
        return "\n".join(lines)


def report_of(
    analysis: Analysis | str,
    options: Options | None = None,
    whole_steps: Signature | str | None = None,
) -> Report:
    """What `explain` says of one graph.

    Args:
        analysis: of the graph, or why it has none.
        options: of the backend.
        whole_steps: of a graph without analysis, what forecasting whole steps takes, or why it
            cannot be done; None if nobody looked.
    """
    known = options or Options()
    if isinstance(analysis, str):
        if isinstance(whole_steps, Signature):
            return Report(False, analysis, "", kept_bytes(whole_steps))
        return Report(False, analysis, whole_steps)
    if analysis.signature.time is None:
        return Report(False, NO_TIME, NO_TIME)
    code = known.kv_cache_code
    return Report(
        selective=True,
        reason="",
        no_step_plan="",
        kept_bytes=kept_bytes(analysis.signature),
        latents=tuple(
            analysis.signature.inputs[pair.latent].name for pair in analysis.signature.denoised
        ),
        segments=analysis.signature.segments,
        regions=analysis.regions,
        cache_bytes=analysis.signature.cache_bytes,
        uncoded=Counter(uncoded(analysis.selection, code).values()) if code is not None else {},
        whole=_whole_ops(analysis.selection),
        sizes=Sizes.of(analysis.selection),
        passes=analysis.records,
        settings=known.resolve(),
        analysis=analysis,
    )


def _whole_ops(selection: Selection) -> tuple[WholeOp, ...]:
    """Ops that a selective step runs on all image tokens; tables are left out."""
    groups: dict[tuple[str, str], list[fx.Node]] = {}
    for node in selection.axes.graph.nodes:
        if (
            node.op == "call_function"
            and node in selection.whole
            and node not in selection.cached
            and node in selection.attention_dependent
            and any(selection.carries(operand) for operand in node.all_input_nodes)
            and selection.extracted_from(node) is None
        ):
            why = selection.why_whole(node) or "what reads it needs all of its tokens"
            groups.setdefault((op_name(node.target), why), []).append(node)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return tuple(
        WholeOp(op, len(nodes), why, module_path(nodes[0])) for (op, why), nodes in ordered
    )
