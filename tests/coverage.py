"""Which transformers of diffusers are accelerated, and is what they give right?

    python -m tests.coverage [--markdown FILE] [NAME ...]

One line for every small configuration of `tests/models`. Step plan: attached, not compiled, it is
driven as Euler drives it (`tests/step_plan.py`). Token selection: compiled, it goes through
`specdiff.verify`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils import _pytree as pytree

import specdiff
from specdiff.plan import Plan
from tests.models import ZOO, Builder, Case
from tests.oracles import small_tables
from tests.step_plan import Wrong, step_plan

Verdict = Literal["rewritten", "attached", "partly", "no", "WRONG"]
"""Of token selection. Attached: the model breaks into graphs, and selects tokens under
`specdiff.attach`. Partly: in some of its graphs."""


@dataclass(frozen=True)
class Row:
    """What became of one configuration."""

    name: str
    model: str
    steps: str
    """Whether it has the step plan: "yes", "WRONG: ..." or why not."""
    verdict: Verdict
    graphs: int
    error: float
    segments: str
    reason: str

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        error = f"{self.error:.0e}" if self.verdict in ("rewritten", "WRONG") else ""
        said = self.segments or self.reason
        return self.model, self.steps, self.verdict, str(self.graphs), error, said

    @property
    def is_wrong(self) -> bool:
        """Whether it gives what it must not give."""
        return "WRONG" in self.verdict or "WRONG" in self.steps


def measure(name: str, builder: Builder) -> Row:
    """Verify one configuration, as it is after a first call (which may build tables)."""
    torch.compiler.reset()
    case = builder()
    with torch.no_grad():
        case.model(**case.inputs)
    with small_tables():
        found = specdiff.verify(case.model, **case.inputs)
    main = next((g for g in found.graphs if _denoises(g.report, case)), None)
    verdict: Verdict = "rewritten" if main else compiled_verdict(case, found.selective)
    segments = main.report.segments if main else ()
    return Row(
        name,
        type(case.model).__name__,
        steps_verdict(builder()),
        verdict if found.passed else "WRONG",
        len(found.graphs),
        found.max_error,
        ", ".join(f"{s.length}{'' if s.prunable else ' kept'}" for s in segments),
        "; ".join(found.reasons),
    )


def steps_verdict(case: Case) -> str:
    """Whether a model that nobody compiled has the step plan."""
    try:
        return step_plan(case) or "yes"
    except Wrong as error:
        return f"WRONG: {error}"


@torch.no_grad()
def compiled_verdict(case: Case, partly: bool) -> Verdict:
    """What a model does that breaks or has no plan: compiled, attached and called five times.

    Calls in which nothing was selected must give what the model gives.
    """
    options = {"inner_backend": "eager"}
    compiled = torch.compile(case.model, backend="specdiff", dynamic=False, options=options)
    plan = Plan.tapered(lookahead=0)
    specdiff.attach(compiled, plan=plan, cache_ratio=0.3)
    call, selected = case.inputs, 0
    for _ in range(5):
        output, exact = first_tensor(compiled(**call)), first_tensor(case.model(**call))
        before, selected = selected, specdiff.stats(compiled).selective
        same = torch.allclose(output, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))
        if selected == before and not same:
            return "WRONG"
        call = case.later(0.1, call)
    return "attached" if selected else "partly" if partly else "no"


def first_tensor(output: object) -> Tensor:
    """The prediction in whatever a model returns."""
    return next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))


def _denoises(report: specdiff.Report, case: Case) -> bool:
    """Whether a graph is the model's own: a part of a broken one denoises something else."""
    return report.selective and any(f"['{case.latent}']" in name for name in report.latents)


def rows(names: Iterable[str]) -> Iterator[Row]:
    """The verdict on each of these configurations."""
    for name in names:
        try:
            yield measure(name, ZOO[name])
        except Exception as error:  # no fault hides the other rows
            model = type(ZOO[name]().model).__name__
            reason = f"{type(error).__name__}: {error}"
            yield Row(name, model, "WRONG", "WRONG", 0, inf, "", reason)


def summary(found: list[Row]) -> str:
    """How many classes have the step plan in every configuration, and selection in one."""
    classes = {row.model for row in found}
    without = {row.model for row in found if row.steps != "yes"}
    rewritten = {row.model for row in found if row.verdict == "rewritten"}
    attached = {row.model for row in found if row.verdict == "attached"} - rewritten
    wrong = [row.name for row in found if row.is_wrong]
    return (
        f"{len(classes - without)} of {len(classes)} classes have the step plan; token selection:"
        f" {len(rewritten)} rewritten, {len(attached)} more when attached; {len(wrong)} wrong"
    )


HEAD = (
    "class", "step plan", "token selection", "graphs", "error",
    "segments, or why no tokens are selected",
)  # fmt: skip


def markdown(found: list[Row]) -> str:
    """The table for a file."""
    lines = [HEAD, ("---",) * len(HEAD), *(row.cells for row in found)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Configurations; all of them.")] = None,
    file: Annotated[Path | None, typer.Option("--markdown", help="Where the table goes.")] = None,
) -> None:
    """Print the table; exit with 1 if any configuration is wrong."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    console = Console()
    found = []
    for row in rows(names or ZOO):
        console.log(row.name, row.steps, row.verdict)
        found.append(row)
    table = Table(*HEAD)
    for row in found:
        table.add_row(*row.cells)
    console.print(table, summary(found))
    if file is not None:
        file.write_text(f"{markdown(found)}\n\n{summary(found)}\n")
    raise typer.Exit(any(row.is_wrong for row in found))


if __name__ == "__main__":
    typer.run(main)
