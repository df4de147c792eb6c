"""What people run, dense and accelerated, against fewer steps at as many evaluations.

    python examples/research/workflows.py --out examples/research/workflows.json
    python examples/research/workflows.py --out examples/research/workflows.json --markdown \
        examples/research/workflows.md

Unmodified diffusers pipelines draw with the demo model, which is attached: nothing is compiled. A
row that is in the file is not run again. "Fewer steps" is the least number of steps that takes no
fewer evaluations. Samplers that draw noise draw other noise in fewer steps: there that column says
less.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from workflow_drawing import Drawing
from workflow_graphs import section, stored
from workflow_kinds import KINDS, Kind

import specdiff
from specdiff.measure.comparison import psnr
from specdiff.models.subject import quiet_libraries

PROMPTS = ("red apple", "frog", "pizza", "penguin")
PLAIN, KNOWN = "attached", "attached, scheduler"
WAYS = (PLAIN, KNOWN, "session", "session, timesteps", "session, scheduler")
"""How specdiff is told; the first two of every row."""


@dataclass(frozen=True)
class Row:
    """A line of the table: one workflow accelerated in one way."""

    kind: str
    way: str
    steps: int
    pictures: int
    evaluations: float
    """Of the dense picture."""
    computed: float
    psnr: float
    """To the dense picture, dB; 99 where they are the same."""
    fewer: float
    """The same of fewer steps."""
    fewer_evaluations: float
    said: list[str] = field(default_factory=list)

    @property
    def ahead(self) -> float:
        """By how much it is closer than fewer steps, dB."""
        return self.psnr - self.fewer

    def __str__(self) -> str:
        ahead = f"{self.ahead:+.1f}" if self.computed < self.evaluations else "dense"
        cells = (
            self.kind, self.way, self.steps, f"{self.computed:g} of {self.evaluations:g}",
            f"{self.psnr:.1f}", f"{self.fewer:.1f} ({self.fewer_evaluations:g})", ahead,
            "; ".join(self.said) or "nothing",
        )  # fmt: skip
        return f"| {' | '.join(map(str, cells))} |"


HEAD = """\
| workflow | way | steps | computed | PSNR, dB | fewer steps, dB (evaluations) | ahead, dB | said |
|---|---|---|---|---|---|---|---|"""


class Said(logging.Handler):
    """What specdiff says."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        logging.getLogger("specdiff").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.lines.append(record.getMessage())


class Bench:
    """One workflow's pictures, counting what the model computes."""

    def __init__(self, kind: Kind, pictures: int) -> None:
        self._kind, self._prompts = kind, PROMPTS[:pictures]
        self._drawn: dict[int, tuple[list[Tensor], float]] = {}
        self._load()

    def _load(self) -> None:
        self.drawing: Drawing = self._kind.load()
        self._computed = 0
        for model in self.drawing.models:
            modules = model.named_modules()
            last = next(m for name, m in modules if name in ("proj_out", "flow.proj_out"))
            last.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self._computed += 1

    def draw(
        self, steps: int, around: Callable[[], Any] = nullcontext
    ) -> tuple[list[Tensor], float]:
        """Pictures, and evaluations of the model for one."""
        self._computed, pictures = 0, []
        for seed, prompt in enumerate(self._prompts):
            with around():
                pictures.append(self.drawing.draw(steps, prompt, seed))
        return pictures, self._computed / len(self._prompts)

    def plain(self, steps: int) -> tuple[list[Tensor], float]:
        """Dense pictures; drawn once."""
        if steps not in self._drawn:
            self._drawn[steps] = self.draw(steps)
        return self._drawn[steps]

    def fewer(self, computed: float, steps: int) -> tuple[list[Tensor], float]:
        """Pictures of the least steps that take no fewer evaluations."""
        least = max(1, math.floor(steps * computed / self.plain(steps)[1]))
        found = self.plain(steps)
        for count in range(least, steps):
            found = self.plain(count)
            if found[1] >= computed:
                return found
        return self.plain(steps)

    def accelerated(self, steps: int, way: str) -> tuple[list[Tensor], float]:
        """Pictures, and evaluations that one of them computes; of a new model, which says all."""
        self._load()
        drawing = self.drawing
        known = {"scheduler": drawing.scheduler} if way == KNOWN else {}
        for model in drawing.models:
            specdiff.attach(model, **known)
            specdiff.reset(model)
        around: Callable[[], Any] = nullcontext
        if way.startswith("session"):
            around = _session(drawing, steps, way)
        try:
            pictures, _ = self.draw(steps, around)
            dense = sum(specdiff.stats(model).dense for model in drawing.models)
        finally:
            for model in drawing.models:
                specdiff.detach(model)
        return pictures, dense / len(self._prompts)


def _session(drawing: Drawing, steps: int, way: str) -> Callable[[], Any]:
    def entered() -> Any:
        if way == "session, timesteps":
            return specdiff.session(drawing.model, timesteps=drawing.times(steps))
        known = {"scheduler": drawing.scheduler} if way == "session, scheduler" else {}
        return specdiff.session(drawing.model, **known)

    return entered


def rows(kind: Kind, pictures: int, known: Sequence[tuple[str, str]]) -> Iterator[Row]:
    """A line for each way that is not known yet."""
    ways = [way for way in kind.ways if (kind.name, way) not in known]
    if not ways:
        return
    bench, said = Bench(kind, pictures), Said()
    for way in ways:
        dense, evaluations = bench.plain(kind.steps)
        said.lines.clear()
        made, computed = bench.accelerated(kind.steps, way)
        lines = list(dict.fromkeys(said.lines))
        few, fewer_evaluations = bench.fewer(computed, kind.steps)
        yield Row(
            kind.name, way, kind.steps, pictures, evaluations, computed,
            _mean(made, dense), _mean(few, dense), fewer_evaluations, lines,
        )  # fmt: skip
    logging.getLogger("specdiff").removeHandler(said)


def _mean(drawn: Sequence[Tensor], dense: Sequence[Tensor]) -> float:
    return statistics.mean(min(psnr(a, b), 99.0) for a, b in zip(drawn, dense, strict=True))


def page(found: Sequence[Row], failed: Sequence[str]) -> str:
    """The table in Markdown."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers")]
    fast = [row for row in found if row.computed < row.evaluations]
    behind = [row for row in fast if row.ahead < -1]
    ahead = [row for row in fast if row.steps >= 20 and row.ahead >= 3]
    long = [row for row in found if row.steps >= 20]
    known = {(row.kind, row.way) for row in found}
    missing = [f"{k.name} ({way})" for k in KINDS for way in k.ways if (k.name, way) not in known]
    silent = [r for r in found if r.computed == r.evaluations > 8 and not r.said]
    return "\n".join([
        "# Workflows", "",
        "Made by [workflows.py](workflows.py) on the demo model (SD3: on that of textures), on a"
        f" CPU; {', '.join(versions)}.",
        f"{found[0].pictures if found else 0} picture(s) a row; PSNR to the same workflow dense.",
        "", f"Of {len(found)} rows {len(fast)} leave evaluations out."
        f" More than 1 dB behind fewer steps: {len(behind)}. Of {len(long)} rows of 20 and more"
        f" steps {len(ahead)} are 3 dB ahead. Dense without a message, of more than eight steps:"
        f" {len(silent)}.", "",
        HEAD, *map(str, found), "", *failed,
        f"Not run: {'; '.join(missing)}." if missing else "Every row was run.", "",
    ])  # fmt: skip


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--kind", action="append", help="only these, by a part of their names")
    parser.add_argument("--out", type=Path, required=True, help="JSON of rows; kept and added to")
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    quiet_libraries()
    known = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else []
    found, failed = [Row(**row) for row in known], []
    for kind in KINDS:
        if given.kind and not any(part in kind.name for part in given.kind):
            continue
        try:
            for row in rows(kind, given.pictures, [(row.kind, row.way) for row in found]):
                print(row, flush=True)
                found.append(row)
                text = json.dumps([asdict(each) for each in found], indent=1)
                given.out.write_text(text + "\n", encoding="utf-8")
        except Exception as error:
            failed.append(f"Not run: {kind.name} ({type(error).__name__}: {error}).")
            print(failed[-1], flush=True)
    if given.markdown:
        graphs = section(stored(given.out.with_name("workflow_graphs.json")))
        given.markdown.write_text(f"{page(found, failed)}\n{graphs}", encoding="utf-8")


if __name__ == "__main__":
    main()
