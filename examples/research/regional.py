"""Whole graph against blocks: compile time, time per picture, and whether both do the same.

    python examples/research/regional.py --json examples/research/regional.json

The demo model under `torch.compile(backend="specdiff")`, and the same model with
`compile_repeated_blocks(backend="specdiff")` and `specdiff.attach`; A B A B in one process.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import print as show
from torch import Tensor

import specdiff
from specdiff import torch_adapter
from specdiff.measure.methods import (
    DemoRun,
    compiled_pipeline,
    demo_requests,
    picture_maker,
)
from specdiff.measure.timing import in_turns, timed
from specdiff.models.subject import Request, emoji, quiet_libraries
from specdiff.runtime.records.recording import Recording

STEPS = 28


def by_blocks(setting: DemoRun, options: Mapping[str, Any]) -> Any:
    """The demo pipeline, its blocks compiled one by one."""
    pipeline = setting.subject.load()
    pipeline.transformer.compile_repeated_blocks(backend="specdiff", fullgraph=True)
    specdiff.attach(pipeline.transformer, **options)
    return pipeline


def compiled_cold(generate: Callable[[Request], Tensor], request: Request) -> tuple[float, Tensor]:
    """Seconds and picture of a first call, nothing of it in Inductor's cache on disk."""
    with torch_adapter.cold_caches():
        picture, seconds = timed(lambda: generate(request))
    return seconds, picture


@contextmanager
def recorded(pipelines: Mapping[str, Any]) -> Iterator[dict[str, Recording]]:
    """What each pipeline's transformer does meanwhile."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(specdiff.record(pipeline.transformer))
            for name, pipeline in pipelines.items()
        }


def chosen(recording: Recording) -> list[Tensor]:
    """The tokens that each selective step computed."""
    return [step.active for step in recording.steps if step.active is not None]


def other_tokens(one: Recording, other: Recording) -> int:
    """Steps at which two runs of the same plan computed different tokens."""
    pairs = zip(chosen(one), chosen(other), strict=True)
    return sum(not torch.equal(mine, theirs) for mine, theirs in pairs)


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the figures go.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds behind each median.")] = 3,
    cache_ratio: Annotated[float, typer.Option(help="As of the backend.")] = 0.75,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure both and print them."""
    quiet_libraries()
    requests = demo_requests((), seed=0)[:2]
    setting = DemoRun(emoji(torch.device(device)), STEPS, {})
    setting.subject.embed(requests)
    options = {"cache_ratio": cache_ratio}
    pipelines = {
        "whole": compiled_pipeline(setting, backend="specdiff", options=options),
        "blocks": by_blocks(setting, options),
    }
    makers = {name: picture_maker(p, setting, STEPS) for name, p in pipelines.items()}
    with recorded(pipelines) as records:
        first = {name: compiled_cold(maker, requests[0]) for name, maker in makers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    apart = float((first["whole"][1] - first["blocks"][1]).abs().max())
    turns = in_turns(list(makers), requests * repeats, lambda name, request: makers[name](request))
    for name, _, _, spent in turns:
        seconds[name].append(spent)
    result = {
        "torch": torch.__version__,
        "device": device,
        "cache_ratio": cache_ratio,
        "first picture, compiling, s": {name: round(s, 1) for name, (s, _) in first.items()},
        "picture, median s": {n: round(statistics.median(s), 3) for n, s in seconds.items()},
        "largest difference of a pixel": apart,
        "selective steps": len(chosen(records["whole"])),
        "of these, with other tokens": other_tokens(records["whole"], records["blocks"]),
    }
    show(result)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
