"""Whether less than every attention of every step tells which tokens matter: recall, both models.

    python examples/shortcuts.py emoji
    python examples/shortcuts.py textures

Every figure is from all queries of the attentions it names, so it is what no sample of them can
surpass: recall of the tokens that all attentions together rank highest (see `recall.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from recall import recall
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.overrides import TorchFunctionMode

from specdiff.evaluation.subject import find_subject
from specdiff.methods import quiet_libraries
from specdiff.runtime.tokens.importance import per_sample

KEPT = (0.5, 0.25, 0.1)
STEPS = {step + back for step in (3, 11, 21) for back in (0, -1, -2)}
"""Three times three steps on end."""
ACTIVE = 0.1
"""Share of tokens that a selective step would compute."""


@dataclass
class Received(TorchFunctionMode):
    """Keeps what each token receives in every attention of some forwards, float32 [B, H, N]."""

    tokens: int
    text_first: bool
    rows: Tensor | None = None
    """int64, of a step before: image tokens whose queries are kept apart."""
    watching: bool = False
    every: list[Tensor] = field(default_factory=list)
    active: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if self.watching and function is F.scaled_dot_product_attention:
            query, key = args[:2] if args else (kwargs["query"], kwargs["key"])
            first = key.shape[-2] - self.tokens if self.text_first else 0
            image = slice(first, first + self.tokens)
            weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)[..., image]
            self.every.append(weights.mean(-2))
            if self.rows is not None:
                self.active.append(weights[:, :, self.rows + first].mean(-2))
        return function(*args, **(kwargs or {}))


def shortcuts(every: Tensor, active: Tensor, before: list[Tensor]) -> dict[str, Tensor]:
    """What each shortcut takes for importance, [B, N].

    Args:
        every: from all queries, [attentions, B, H, N].
        active: from the tokens that mattered a step before, the same.
        before: `every` of earlier steps, newest first.
    """
    count, heads = every.shape[0], every.shape[2]
    parts = {
        "every 2nd attention": every[::2],
        "the other half": every[1::2],
        "every 3rd attention": every[::3],
        "the middle half": every[count // 4 : count // 4 + (count + 1) // 2],
        "half of the heads": every[:, :, : heads // 2],
        "one head": every[:, :, :1],
        f"queries of the {ACTIVE:.0%} that mattered before": active,
        "the step before": before[0],
        "two steps before": before[1],
        "mean of three steps": every + before[0] + before[1],
    }
    return {name: part.sum((0, 2)) for name, part in parts.items()}


def watch(pipeline: Any, seen: Received, guided: bool, record: Callable[..., None]):
    """Look at some of the transformer's forwards; returns what begins another picture."""
    forward, kept = pipeline.transformer.forward, []

    def run(*args: Any, **kwargs: Any) -> Any:
        step = len(kept)
        seen.watching = step in STEPS
        with seen:
            output = forward(*args, **kwargs)
        kept.append(torch.stack(seen.every) if seen.every else None)
        if step - 2 in STEPS and seen.active and kept[step - 1] is not None:
            record(kept[step], torch.stack(seen.active), [kept[step - 1], kept[step - 2]])
        if kept[step] is not None:
            scaled = per_sample(kept[step].sum((0, 2)), guided)[0]
            seen.rows = scaled.topk(round(ACTIVE * seen.tokens)).indices
        seen.every, seen.active = [], []
        return output

    pipeline.transformer.forward = run
    return kept.clear


def main(
    model: Annotated[str, typer.Argument(help="emoji or textures.")] = "emoji",
    weights: Annotated[Path, typer.Option(help="Of the texture model.")] = Path(
        "examples/textures/textures.safetensors"
    ),
    pictures: Annotated[int, typer.Option(min=1, help="Pictures to draw.")] = 3,
) -> None:
    """Measure and print the table."""
    quiet_libraries()
    subject = find_subject(model, weights, torch.device("cpu"))
    guided = "guidance_scale" in subject.options
    found: dict[tuple[str, float], list[float]] = defaultdict(list)

    def record(every: Tensor, active: Tensor, before: list[Tensor]) -> None:
        exact = per_sample(every.sum((0, 2)), guided)[:1]
        for name, part in shortcuts(every, active, before).items():
            scaled = per_sample(part, guided)[:1]
            for share in KEPT:
                count = round(share * exact.shape[1])
                found[name, share].append(recall(scaled, exact, count))

    pipeline = subject.load()
    restart = watch(pipeline, Received(tokens=1024, text_first=model == "emoji"), guided, record)
    for request in subject.tuning_requests(pictures):
        restart()
        subject.draw(pipeline, request)
    table = Table(model, *(f"top {share:.0%}" for share in KEPT))
    for name in dict.fromkeys(name for name, _ in found):
        means = (torch.tensor(found[name, share]).mean().item() for share in KEPT)
        table.add_row(name, *(f"{mean:.3f}" for mean in means))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
