"""What every pass shares: a name, a verifier, a printable result; and their timed runner."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from torch import fx

In = TypeVar("In")
Out = TypeVar("Out")


class PassError(AssertionError):
    """A pass broke one of its invariants: a bug of ours, never of the user's model."""


class Pass(ABC, Generic[In, Out]):
    """One rewriting or analysing step; `apply` never mutates its input."""

    name: str

    @abstractmethod
    def apply(self, value: In) -> Out:
        """The pass itself. Raises Unsupported with a reason."""

    def verify(self, value: In, result: Out) -> None:
        """Raise PassError if `result` breaks an invariant of this pass."""

    def render(self, result: Out) -> str:
        """`result` as readable text for a dump."""
        return str(result)


@dataclass(frozen=True)
class PassRecord:
    """What one pass did."""

    name: str
    seconds: float


class PassRunner:
    """Runs passes in order; times each, verifies it if asked, dumps it if a folder is given."""

    def __init__(self, dump_dir: Path | None = None, verify: bool = False) -> None:
        self.records: list[PassRecord] = []
        self._dump_dir = dump_dir
        self._verify = verify

    def run(self, step: Pass[In, Out], value: In) -> Out:
        """`step.apply(value)`, recorded."""
        start = time.perf_counter()
        result = step.apply(value)
        seconds = time.perf_counter() - start
        if self._verify:
            step.verify(value, result)
        self._dump(step, result, seconds)
        self.records.append(PassRecord(step.name, seconds))
        return result

    def _dump(self, step: Pass[In, Out], result: Out, seconds: float) -> None:
        if self._dump_dir is None:
            return
        self._dump_dir.mkdir(parents=True, exist_ok=True)
        path = self._dump_dir / f"{len(self.records):02d}_{step.name}.txt"
        path.write_text(f"# {step.name}: {seconds * 1e3:.1f} ms\n{step.render(result)}\n")


def check_values(graph: fx.Graph) -> None:
    """Every computed node carries `meta["val"]`. Raises PassError naming the first without."""
    graph.lint()
    for node in graph.nodes:
        if node.op in ("call_function", "placeholder") and "val" not in node.meta:
            raise PassError(f"{node.name} ({node.target}) has no meta['val']")
