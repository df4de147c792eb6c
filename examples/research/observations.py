"""The paper's observations on our own trained models: plots and numbers.

    python examples/research/observations.py --model emoji --out FOLDER

Fidelity is PSNR against the dense run and cost is tokens, so no calm machine is needed. Prompts and
seeds are those of `specdiff eval`: not the ones that the defaults were tuned on.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from observations.claims import recalls, reuse_errors, same_time, selections, similarities
from observations.plots import draw
from observations.records import Record, record
from rich.progress import track

import specdiff
from specdiff.measure.comparison import psnr
from specdiff.models.subject import STEPS, Request, Subject, find_subject, quiet_libraries
from specdiff.plan import Plan

SHARE = 0.25
"""Share of tokens that count as important: a cache ratio of 0.75."""
WARM_UP = 3
PAPER: Mapping[str, Any] = {
    "method": "paper",
    "plan": Plan.warmup(WARM_UP),
    "cache_ratio": 1 - SHARE,
}
RUNS: Mapping[str, Mapping[str, Any]] = {
    "paper": {},
    "no look-ahead": {"plan": Plan.warmup(WARM_UP, lookahead=0)},
    "3 speculative steps": {"plan": Plan.warmup(WARM_UP, lookahead=3)},
    "4 speculative steps": {"plan": Plan.warmup(WARM_UP, lookahead=4)},
    "no starvation": {"ablation": {"starvation": 0.0}},
    "starvation 0.1": {"ablation": {"starvation": 0.1}},
    "no class C2": {"ablation": {"reuse_share": 0.0}},
    "C3 reuses, too": {"forecast": "reuse"},
    "own history": {"method": "history"},
}
"""Changes to `PAPER`: table 4, figure 5a and the ablation of figure 8."""
SPECULATIVE = (2, 3, 4)


def measure_terms(subject: Subject, requests: Sequence[Request]) -> dict[str, dict[str, float]]:
    """PSNR, tokens and selection counts of the paper's method with each term changed."""
    options = {**subject.options, **PAPER, "inner_backend": "eager"}
    plain, pipeline = subject.load(), subject.load()
    dense = [subject.picture(subject.draw(plain, request)) for request in requests]
    compiled: Any = torch.compile(pipeline.transformer, backend="specdiff", options=options)
    pipeline.transformer = compiled
    defaults = dict.fromkeys(name for changes in RUNS.values() for name in changes)
    found = {}
    for name, changes in track(RUNS.items(), "terms of the method"):
        specdiff.configure(compiled, **{**defaults, **PAPER, **changes})
        specdiff.reset(compiled)
        rows = []
        for request, reference in zip(requests, dense, strict=True):
            fidelity = psnr(subject.picture(subject.draw(pipeline, request)), reference)
            counts = specdiff.stats(compiled).token_counts
            assert counts is not None
            rows.append({"psnr_db": fidelity, **selections(counts[-1] - WARM_UP)})
        stats = specdiff.stats(compiled)
        found[name] = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
        found[name]["tokens_share"] = stats.tokens_computed / stats.tokens_total
    return found


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(column) for column in zip(*rows, strict=True)]


def observe(subject: Subject, requests: Sequence[Request]) -> dict[str, Any]:
    """Everything but the terms, from dense runs and runs of few steps."""
    dense = [record(subject, request) for request in track(requests, "dense runs")]
    ahead: dict[int, list[Record]] = {
        steps: [record(subject, request, steps) for request in requests] for steps in SPECULATIVE
    }
    each = [recalls(a, b, SHARE, age=1) for a, b in zip(dense, ahead[2], strict=True)]
    old = [recalls(a, b, SHARE, age=4) for a, b in zip(dense, ahead[2], strict=True)]
    times = dense[0].times
    return {
        "share": SHARE,
        "recall": _over_pictures(each),
        "recall_4_steps_old": _over_pictures(old),
        "reuse_error": reuse_errors(dense, ahead[2]),
        "similarity": _mean([similarities(one) for one in dense]),
        "same_time": {str(steps): same_time(dense[0], ahead[steps][0]) for steps in SPECULATIVE},
        "nearest_step": {
            str(steps): [int((times - time).abs().argmin()) for time in ahead[steps][0].times]
            for steps in SPECULATIVE
        },
    }


def _over_pictures(each: Sequence[dict[str, list[list[float]]]]) -> dict[str, list[list[float]]]:
    return {
        name: [_mean([one[name][index] for one in each]) for index in range(len(rows))]
        for name, rows in each[0].items()
    }


def main(
    model: Annotated[str, typer.Option(help="emoji or textures.")] = "emoji",
    weights: Annotated[Path, typer.Option(help="Of the texture model.")] = Path(
        "examples/training/textures/textures.safetensors"
    ),
    pictures: Annotated[int, typer.Option(min=1, help="How many are drawn.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the first.")] = 100,
    out: Annotated[Path, typer.Option(help="Folder for numbers and plots.")] = Path("observations"),
) -> None:
    """Observe, draw and write down."""
    quiet_libraries()
    subject = find_subject(model, weights, torch.device("cpu"))
    requests = subject.requests(pictures, seed)
    with torch.no_grad():
        found = {"model": model, "pictures": pictures, "seed": seed, "steps": STEPS}
        found |= observe(subject, requests)
        found["terms"] = measure_terms(subject, requests)
    out.mkdir(parents=True, exist_ok=True)
    (out / "numbers.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found, out / "plots.png")


if __name__ == "__main__":
    typer.run(main)
