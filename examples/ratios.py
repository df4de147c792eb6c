"""Time and fidelity of the demo model over cache ratios and schedules, beside fewer steps.

    python examples/ratios.py --first 12 --seed 100 --json examples/demo/ratios.json

One process, one compiled model per backend, the settings taking turns (A B A B); medians of wall
time per picture; PSNR and SSIM against the dense run of the same seeds. Needs a calm machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

import specdiff
from specdiff.comparison import Method, Request, compare
from specdiff.demo import stored_prompts
from specdiff.methods import (
    Setting,
    compiled_pipeline,
    demo_requests,
    dense_methods,
    embed,
    picture_maker,
    quiet_libraries,
)
from specdiff.summary import load_per_core, record, table

SETTINGS: dict[str, Mapping[str, Any]] = {
    "default": {},
    "default, dense every 4": {"refresh_interval": 4},
    "history, ratio 0.5": {"cache_ratio": 0.5},
    "history, ratio 0.75": {"cache_ratio": 0.75},
    "history, ratio 0.9": {"cache_ratio": 0.9},
    "history, ratio 0.95": {"cache_ratio": 0.95},
    "paper, ratio 0.5": {"method": "paper", "cache_ratio": 0.5},
    "paper, ratio 0.75": {"method": "paper", "cache_ratio": 0.75},
    "paper, ratio 0.9": {"method": "paper", "cache_ratio": 0.9},
    "paper, ratio 0.95": {"method": "paper", "cache_ratio": 0.95},
}
CLEARED = dict.fromkeys(("method", "cache_ratio", "refresh_interval", "stride"))
FEWER_STEPS = (22, 18, 14, 12, 10)


def configured(
    compiled: Any, generate: Callable[[Request], Tensor], settings: Mapping[str, Any]
) -> Callable[[Request], Tensor]:
    """`generate` under these settings of a compiled model that others use in turn."""

    def run(request: Request) -> Tensor:
        specdiff.configure(compiled, **{**CLEARED, "method": "history", **settings})
        return generate(request)

    return run


def methods(setting: Setting) -> list[Method]:
    """Dense, fewer steps, then every setting on one model compiled with specdiff."""
    reference, shorter = dense_methods(setting, FEWER_STEPS)
    pipeline = compiled_pipeline(setting, backend="specdiff")
    compiled = pipeline.transformer
    generate = picture_maker(pipeline, setting, setting.steps)
    selective = [
        Method(
            name,
            setting.steps,
            configured(compiled, generate, settings),
            lambda: specdiff.stats(compiled),
            settings,
        )
        for name, settings in SETTINGS.items()
    ]
    return [reference, *shorter, *selective]


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the figures go.")] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Stored prompts to draw.")] = 4,
    first: Annotated[int, typer.Option(min=0, help="Which of them comes first.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the first picture.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds behind each median.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure every setting and print the table."""
    quiet_libraries()
    place = torch.device(device)
    requests = demo_requests(stored_prompts()[first : first + pictures], seed)
    load = load_per_core()
    setting = Setting(place, 28, {}, embed(requests, place))
    console = Console()
    result = compare(methods(setting), requests, repeats, console.log)
    console.print(table(result))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(record(result, place, repeats, load), indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
