"""How many graphs a workflow compiles, with specdiff and with plain torch.compile.

    python examples/research/workflow_graphs.py --out examples/research/workflow_graphs.json

One picture of `STEPS` steps each, the model compiled in place, what it is compiled to run by
torch's own kernels. A workflow that is in the file is not run again. `workflows.py` puts the table
on its page.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workflow_kinds import KINDS, Kind

import specdiff
from specdiff.models.subject import quiet_libraries
from specdiff.torch_adapter import forget_compiled, graphs_compiled

STEPS = 12
CHANGES = (
    "guidance cut off at 60 %, SD3", "skip-layer guidance, SD3", "true CFG", "ControlNet",
    "inpainting", "image to image, 60 %", "tiles, by hand", "guidance cut off at 60 %, by hand",
    "guidance at every other step, by hand", "two experts, by hand", "Kontext", "Euler",
)  # fmt: skip
"""Workflows whose graphs may change on the way."""
PLAIN: Mapping[str, Any] = {"backend": "eager"}
SPECDIFF: Mapping[str, Any] = {"backend": "specdiff", "options": {"inner_backend": "eager"}}


@dataclass(frozen=True)
class Graphs:
    """Of one workflow."""

    kind: str
    plain: int
    """That torch.compile hands to a backend."""
    specdiff: int
    """That it hands to specdiff."""
    computed: int
    evaluations: int


def measured(kind: Kind) -> Graphs:
    """The graphs of one picture."""
    plain, _ = _drawn(kind, PLAIN)
    found, models = _drawn(kind, SPECDIFF)
    stats = [specdiff.stats(model) for model in models]
    computed = sum(each.dense for each in stats)
    return Graphs(kind.name, plain, found, computed, computed + sum(s.skipped for s in stats))


def _drawn(kind: Kind, compiled: Mapping[str, Any]) -> tuple[int, Sequence[Any]]:
    forget_compiled()
    drawing = kind.load()
    for model in drawing.models:
        model.compile(**compiled)
    drawing.draw(STEPS, "red apple", 0)
    return graphs_compiled(), drawing.models


def section(found: Sequence[Graphs]) -> str:
    """The table in Markdown."""
    more = sum(row.specdiff > row.plain for row in found)
    return "\n".join([
        "## Graphs", "",
        "Made by [workflow_graphs.py](workflow_graphs.py): the model compiled in place, one picture"
        f" of {STEPS} steps. More graphs than plain `torch.compile`: {more} of {len(found)}.", "",
        "| workflow | torch.compile | specdiff | computed |", "|---|---|---|---|",
        *(f"| {r.kind} | {r.plain} | {r.specdiff} | {r.computed} of {r.evaluations} |"
          for r in found),
        "",
    ])  # fmt: skip


def stored(file: Path) -> list[Graphs]:
    """What is in a file, if there is one."""
    return [Graphs(**row) for row in json.loads(file.read_text("utf-8"))] if file.exists() else []


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON; kept and added to")
    given = parser.parse_args()
    quiet_libraries()
    found = stored(given.out)
    kinds = sorted((k for k in KINDS if k.name in CHANGES), key=lambda k: CHANGES.index(k.name))
    for kind in kinds:
        if kind.name not in [row.kind for row in found]:
            found.append(measured(kind))
            print(found[-1], flush=True)
            text = json.dumps([asdict(row) for row in found], indent=1)
            given.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
