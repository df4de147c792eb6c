"""How well sampled attention finds the tokens that all attention would, and what that costs.

    python examples/research/recall.py --json recall.json
    python examples/research/recall.py --model textures --json recall-textures.json

Importance is what a token receives of all attentions. At several steps of a trained model's
trajectories it is measured from every query, and from a sample; recall is the share of the exact
top tokens that are among the top by the sample. The cost is in FLOPs of a dense step without;
`--seconds` adds processor time of the compiled step, without and with the sample in turn.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx

from specdiff.compiler import ALL_QUERIES, program_compiler
from specdiff.evaluation.measures import flop_counter
from specdiff.models.subject import Subject, find_subject, quiet_libraries
from specdiff.options import Options
from specdiff.passes.emit.lower import LoweredPrograms
from specdiff.pipeline import Analysis, trace_and_analyse
from specdiff.runtime.tokens.importance import per_sample
from specdiff.settings import IMPORTANCE_QUERIES

QUERIES = (32, 64, 128, 256, 512)
KEPT = (0.5, 0.25, 0.1, 0.05)
"""Shares of tokens that a selective step computes."""
EVERY = 5
"""Steps from one that is measured to the next."""
ROUNDS = 12
"""Pairs of steps that are timed."""
Measured = Callable[[dict[int, Tensor]], None]


def recall(sampled: Tensor, exact: Tensor, count: int) -> float:
    """Share of the `count` highest of `exact` [B, N] that are among those of `sampled`."""
    found, wanted = (importance.topk(count, dim=1).indices for importance in (sampled, exact))
    hits = (wanted.unsqueeze(2) == found.unsqueeze(1)).any(2)
    return hits.float().mean().item()


class Dense:
    """The dense step of one graph that samples so many queries; 0: measures nothing."""

    def __init__(self, analysis: Analysis, queries: int, inner: str = "eager") -> None:
        compiler = program_compiler(None, Options(inner_backend=inner), {})
        self._programs = LoweredPrograms(
            analysis.module, analysis.selection, analysis.signature, queries, compiler
        )
        self._caches = [slot.allocate() for slot in analysis.signature.caches]

    def importance(self, values: Sequence[Any]) -> Tensor:
        """Of every token, [B, N]."""
        return self._programs.dense(values, self._caches).importance

    def flops(self, values: Sequence[Any]) -> int:
        """Of matrix products and attentions."""
        with flop_counter() as counter:
            self.importance(values)
        return counter.get_total_flops()

    def seconds(self, values: Sequence[Any]) -> float:
        """Of one processor."""
        start = time.process_time()
        self.importance(values)
        return time.process_time() - start


def slower(analysis: Analysis, queries: int, values: Sequence[Any]) -> float:
    """Processor time of a compiled dense step with the sample, over one without, less one."""
    without, sampling = (Dense(analysis, q, "inductor") for q in (0, queries))
    for step in (without, sampling, without, sampling):
        step.seconds(values)
    pairs = [(without.seconds(values), sampling.seconds(values)) for _ in range(ROUNDS)]
    return statistics.median(b / a for a, b in pairs) - 1


def watched(record: Measured, costs: dict[str, Any], timed: bool) -> Callable[..., Any]:
    """A backend that runs a model as it is, and every few calls measures importance as well."""

    def backend(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        found = trace_and_analyse(module, inputs, Options())
        assert isinstance(found, Analysis), found
        samples = {queries: Dense(found, queries) for queries in (*QUERIES, ALL_QUERIES)}
        calls = 0

        def run(*values: Any) -> Any:
            nonlocal calls
            if not costs:
                least = Dense(found, 0).flops(values)
                costs["flops"] = {q: samples[q].flops(values) / least - 1 for q in QUERIES}
                costs["default"] = IMPORTANCE_QUERIES
                if timed:
                    costs["seconds"] = slower(found, costs["default"], values)
            if calls % EVERY == 0:
                record({q: dense.importance(values) for q, dense in samples.items()})
            calls += 1
            return module(*values)

        return run

    return backend


def draw(subject: Subject, pictures: int, backend: Callable[..., Any]) -> None:
    """Some pictures of the kind that may be tuned on."""
    pipeline = subject.load()
    pipeline.transformer = torch.compile(pipeline.transformer, backend=backend, fullgraph=True)
    for request in subject.tuning_requests(pictures):
        subject.draw(pipeline, request)


def main(
    model: Annotated[str, typer.Option(help="emoji or textures.")] = "emoji",
    weights: Annotated[Path, typer.Option(help="Of the texture model.")] = Path(
        "examples/training/textures/textures.safetensors"
    ),
    pictures: Annotated[int, typer.Option(min=1, help="Pictures to draw.")] = 4,
    seconds: Annotated[bool, typer.Option(help="Time the compiled step too.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the figures go.")] = None,
) -> None:
    """Measure and print the table."""
    quiet_libraries()
    subject = find_subject(model, weights, torch.device("cpu"))
    guided = "guidance_scale" in subject.options
    found: dict[tuple[int, float], list[float]] = defaultdict(list)
    costs: dict[str, Any] = {}

    def record(importance: dict[int, Tensor]) -> None:
        # as the runtime selects by it: one set for both halves of a guided batch
        scaled = {q: per_sample(seen, guided)[:1] for q, seen in importance.items()}
        exact = scaled.pop(ALL_QUERIES)
        for queries, sampled in scaled.items():
            for share in KEPT:
                count = round(share * exact.shape[1])
                found[queries, share].append(recall(sampled, exact, count))

    draw(subject, pictures, watched(record, costs, seconds))
    means = {key: statistics.fmean(values) for key, values in found.items()}
    table = Table("queries", *(f"top {share:.0%}" for share in KEPT), "FLOPs")
    for queries in QUERIES:
        shares = (f"{means[queries, share]:.3f}" for share in KEPT)
        table.add_row(str(queries), *shares, f"{costs['flops'][queries]:+.2%}")
    Console().print(table)
    if seconds:
        print(f"{costs['default']} queries, compiled: {costs['seconds']:+.2%} of processor time")
    if json_file is not None:
        figures = [
            {
                "queries": queries,
                "flops": round(costs["flops"][queries], 4),
                "recall": {f"{share:.2f}": round(means[queries, share], 4) for share in KEPT},
            }
            for queries in QUERIES
        ]
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
