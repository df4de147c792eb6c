"""Pass: what all passes have in common, and the runner that times and verifies them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import fx

In = TypeVar("In")
Out = TypeVar("Out")
Notes = Mapping[fx.Node, list[str]]
"""For each node of the latest graph, what passes say of it, a line each."""


class PassError(AssertionError):
    """A pass broke one of its invariants: a bug of specdiff, never of the user's model."""


class Pass(ABC, Generic[In, Out]):
    """One rewriting or analysing step; `apply` never mutates its input."""

    name: str

    @abstractmethod
    def apply(self, value: In) -> Out:
        """Run the pass. Raises Unsupported with a reason."""

    def verify(self, value: In, result: Out) -> None:
        """Raise PassError if `result` breaks an invariant of this pass."""

    @abstractmethod
    def summary(self, result: Out) -> str:
        """What the pass changed or found, in one line."""

    def notes(self, result: Out) -> Mapping[fx.Node, str]:
        """What an analysing pass says of single nodes; nothing by default."""
        return {}


@dataclass(frozen=True)
class PassRecord:
    """What one pass did."""

    name: str
    seconds: float
    before: int
    """Nodes of the graph that it was given."""
    after: int
    """Nodes of the graph that it left."""
    summary: str

    def __str__(self) -> str:
        """One line: name, time, nodes, summary."""
        took = f"{self.seconds * 1e3:.1f} ms, {self.before} -> {self.after} nodes"
        return f"{self.name}: {took}; {self.summary}"


Observer = Callable[[PassRecord, fx.GraphModule, Notes], None]
"""(what a pass did, the graph after it, notes of this and earlier passes) -> nothing."""


class PassRunner:
    """Runs passes in order: times each, verifies it if asked, informs observers.

    Args:
        module: the graph before the first pass; observers get it first.
        observers: called after each pass; they must not change the graph.
        verify: whether passes check their invariants.
    """

    def __init__(
        self, module: fx.GraphModule, observers: Sequence[Observer] = (), verify: bool = False
    ) -> None:
        self.records: list[PassRecord] = []
        self._module = module
        self._notes: defaultdict[fx.Node, list[str]] = defaultdict(list)
        self._observers = observers
        self._verify = verify
        count = len(module.graph.nodes)
        self._tell(PassRecord("dynamo", 0.0, count, count, "the graph as Dynamo hands it over"))

    def run(self, step: Pass[In, Out], value: In) -> Out:
        """Return `step.apply(value)` and record it."""
        before = len(self._module.graph.nodes)
        start = time.perf_counter()
        result = step.apply(value)
        seconds = time.perf_counter() - start
        if self._verify:
            step.verify(value, result)
        if isinstance(result, fx.GraphModule):
            self._module = result
            self._notes.clear()
        after = len(self._module.graph.nodes)
        record = PassRecord(step.name, seconds, before, after, step.summary(result))
        self.records.append(record)
        if self._observers:
            for node, note in step.notes(result).items():
                self._notes[node].append(f"{step.name}: {note}")
        self._tell(record)
        return result

    def _tell(self, record: PassRecord) -> None:
        for observer in self._observers:
            observer(record, self._module, self._notes)


def check_values(graph: fx.Graph) -> None:
    """Raise PassError, naming the node, if a computed node has no `meta["val"]`."""
    graph.lint()
    for node in graph.nodes:
        if node.op in ("call_function", "placeholder") and "val" not in node.meta:
            raise PassError(f"{node.name} ({node.target}) has no meta['val']")
