"""How well sampled attention finds the tokens that all attention would: recall on the demo model.

    python examples/recall.py --json examples/demo/recall.json

Importance is what a token receives of all attentions. At several steps of the demo's trajectories
it is measured from every query, and from a sample; recall is the share of the exact top tokens that
are among the top by the sample.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx

from specdiff.compiler import Analysis, attempt, programs_of
from specdiff.demo import PIPELINE_SIDE, load_pipeline, prompt_embeddings, stored_prompts
from specdiff.methods import quiet_libraries
from specdiff.options import Options
from specdiff.passes.lower import LoweredPrograms

QUERIES = (32, 64, 128, 256, 512)
KEPT = (0.5, 0.25, 0.1, 0.05)
"""Shares of tokens that a selective step computes."""
STEPS = 28
EVERY = 5
"""Steps from one that is measured to the next."""


def recall(sampled: Tensor, exact: Tensor, count: int) -> float:
    """Share of the `count` highest of `exact` [B, N] that are among those of `sampled`."""
    found, wanted = (importance.topk(count, dim=1).indices for importance in (sampled, exact))
    hits = (wanted.unsqueeze(2) == found.unsqueeze(1)).any(2)
    return hits.float().mean().item()


def programs(analysis: Analysis, queries: int | None) -> LoweredPrograms:
    """The programs that sample so many queries, or all, not compiled."""
    options = Options(importance_queries=queries, inner_backend="eager")
    return programs_of(analysis, options, {})


def watched(record: Callable[[dict[int | None, Tensor]], None]) -> Callable[..., Any]:
    """A backend that runs a model as it is, and every few calls measures importance as well."""

    def backend(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        found = attempt(module, inputs, Options())
        assert isinstance(found, Analysis), found
        samples = {queries: programs(found, queries) for queries in (*QUERIES, None)}
        calls = 0

        def run(*values: Any) -> Any:
            nonlocal calls
            if calls % EVERY == 0:
                record({q: p.probe(values).importance for q, p in samples.items()})
            calls += 1
            return module(*values)

        return run

    return backend


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the figures go.")] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Stored prompts to draw.")] = 4,
) -> None:
    """Measure and print the table."""
    quiet_libraries()
    found: dict[tuple[int, float], list[float]] = defaultdict(list)

    def record(importance: dict[int | None, Tensor]) -> None:
        exact = importance.pop(None)
        for queries, sampled in importance.items():
            for share in KEPT:
                count = round(share * exact.shape[1])
                found[queries, share].append(recall(sampled, exact, count))

    pipeline: Any = load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer = torch.compile(
        pipeline.transformer, backend=watched(record), fullgraph=True
    )
    for seed, prompt in enumerate(stored_prompts()[:pictures]):
        tokens, pooled = prompt_embeddings([prompt])
        pipeline(
            prompt_embeds=tokens,
            pooled_prompt_embeds=pooled,
            height=PIPELINE_SIDE,
            width=PIPELINE_SIDE,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        )
    means = {key: sum(values) / len(values) for key, values in found.items()}
    table = Table("queries", *(f"top {share:.0%}" for share in KEPT))
    for queries in QUERIES:
        table.add_row(str(queries), *(f"{means[queries, share]:.3f}" for share in KEPT))
    Console().print(table)
    if json_file is not None:
        figures = [
            {"queries": queries, "share": share, "recall": round(mean, 4)}
            for (queries, share), mean in means.items()
        ]
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
