"""Regional: one compiled block answers as its root, the whole model, tells it.

A model that is compiled block by block has no graph with latent and time. `specdiff.attach` watches
its root instead: every call of the root is a `RootCall`, under which blocks compute all tokens, the
active ones or none, each with caches of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from specdiff.errors import Unsupported
from specdiff.program import CacheSlot
from specdiff.runtime.streams.registry import first_parameter

_CALL: ContextVar[RootCall | None] = ContextVar("specdiff_root_call", default=None)

Kind = Literal["plain", "probe", "dense", "selective", "whole"]
"""Plain: as blocks were traced; whole: as they were compiled, of a root that selects no tokens."""


class Diverged(Exception):
    """The root called other blocks than in its first call; the message says which."""


class ProgramsOfBlock(Protocol):
    """What one block runs for a given number of prunable tokens."""

    @property
    def slots(self) -> tuple[CacheSlot, ...]:
        """The caches of one call."""

    @property
    def attentions(self) -> int:
        """How many of the model's attentions importance is taken from here."""

    @property
    def compile_seconds(self) -> Mapping[str, float]:
        """Seconds spent compiling each program, by its name."""

    def probe(self, inputs: Sequence[object]) -> list[Tensor]:
        """The block's outputs."""

    def dense(
        self, inputs: Sequence[object], caches: Sequence[Tensor], before: Tensor
    ) -> list[Tensor]:
        """Outputs and importance, caches overwritten; `before`, int64 [1]: attentions before."""

    def selective(
        self,
        inputs: Sequence[object],
        caches: Sequence[Tensor],
        active: Tensor,
        before: Tensor | None,
    ) -> list[Tensor]:
        """The same for active tokens only; without `before`, outputs alone."""


class Prunable(NamedTuple):
    """Which tokens of a block may be left out."""

    tokens: int
    """Their number."""
    holder: str | None = None
    """The argument of the block that holds them, where their number does not tell."""


NOTHING = Prunable(0)


class Block:
    """Answers one compiled block, which several modules of a class may share.

    Args:
        alone: answers calls outside of any attached root.
        dense: the block as it was traced, compiled.
        eager: the block as it was traced.
        lengths: tokens of each segment that the block's attentions read.
        returned: those of the segments that its outputs have.
        held: those of the segments that each argument holds, by its name.
        plan: programs for prunable tokens. Raises Unsupported.
        parameters: positions of parameters and buffers among the inputs.
        work: what the block computes: equal for one that was traced anew for other strides, but
            not for other processors, or adapters of another strength.
    """

    def __init__(
        self,
        alone: Callable[..., Any],
        dense: Callable[..., Any],
        eager: Callable[..., Any],
        lengths: frozenset[int],
        returned: frozenset[int],
        held: Mapping[str, frozenset[int]],
        plan: Callable[[Prunable], ProgramsOfBlock],
        parameters: Sequence[int],
        work: Hashable = None,
    ) -> None:
        self._alone = alone
        self.dense = dense
        self.eager = eager
        self.lengths = lengths
        self.returned = returned
        self.work = work
        self.held = held
        self._plan = plan
        self._parameters = tuple(parameters)
        self._planned: dict[Prunable, ProgramsOfBlock] = {}

    def __call__(self, *inputs: object) -> Any:
        """The graph's outputs for its flat inputs."""
        call = _CALL.get()
        if call is not None and call.kind == "whole":
            return self.dense(*inputs)
        first = first_parameter(inputs, self._parameters)
        if call is None or id(first) not in call.parameters:
            return self._alone(*inputs)
        return call.answer(self, self._owner(inputs), inputs)

    def _owner(self, inputs: Sequence[object]) -> int:
        values = (inputs[index] for index in self._parameters)
        return hash(identities(v for v in values if isinstance(v, torch.nn.Parameter)))

    def lengths_of(self, holder: str | None) -> frozenset[int]:
        """Tokens of each segment, or of each that an argument holds."""
        return self.lengths if holder is None else self.held.get(holder, frozenset())

    def has(self, prunable: Prunable) -> bool:
        """Whether the block computes these tokens."""
        return prunable.tokens in self.lengths_of(prunable.holder)

    def planned(self, prunable: Prunable) -> ProgramsOfBlock:
        """The programs that prune these tokens. Raises Unsupported."""
        if prunable not in self._planned:
            self._planned[prunable] = self._plan(prunable)
        return self._planned[prunable]


class OneGraph:
    """Answers a graph whose tokens cannot be selected.

    Args:
        alone: answers calls outside of any attached root.
        dense: the graph as it came, compiled; what a step of an attached root runs.
    """

    def __init__(self, alone: Callable[..., Any], dense: Callable[..., Any]) -> None:
        self._alone = alone
        self._dense = dense

    def __call__(self, *inputs: object) -> Any:
        """The graph's outputs for its flat inputs."""
        return self._dense(*inputs) if is_attached() else self._alone(*inputs)


@dataclass(frozen=True, eq=False)
class Visit:
    """One call of a block, in the order of the root's forward."""

    block: Block
    owner: int
    """Hash of the parameters, adapters included: blocks of a class share a graph, not those."""
    before: Tensor | None = None
    """int64 [1]: attentions of the forward before those of the block, that each may sample others
    of its rows; None of text."""


def numbered(visits: Sequence[Visit], prunable: Prunable) -> list[Visit]:
    """The visits of a forward, each told how many attentions read these tokens before."""
    counted, count = [], 0
    for visit in visits:
        if not visit.block.has(prunable):
            counted.append(visit)
            continue
        programs = visit.block.planned(prunable)
        before = torch.tensor([count], device=programs.slots[0].device)
        counted.append(replace(visit, before=before))
        count += programs.attentions
    return counted


@dataclass
class RootCall:
    """One forward of the root, and what its blocks are to do."""

    kind: Kind
    parameters: frozenset[int] = frozenset()
    """Identities of the root's parameters."""
    prunable: Prunable = NOTHING
    known: Sequence[Visit] = ()
    """The calls of an earlier forward, which this one must repeat; none for the first look."""
    caches: Sequence[Tensor] = ()
    """Those of all calls, one after another."""
    active: Tensor | None = None
    measures: bool = True
    """Whether importance is wanted of a selective call; of a dense one it always is."""
    visits: list[Visit] = field(default_factory=list)
    """What a plain call has seen."""
    importance: Tensor | None = None
    """float32 [B, N], summed over blocks; None where it is not measured."""
    _visited: int = 0

    def answer(self, block: Block, owner: int, inputs: Sequence[object]) -> list[Tensor]:
        """The outputs of one block."""
        if self.kind == "plain":
            outputs = list((block.dense if self.known else block.eager)(*inputs))
            self.visits.append(Visit(block, owner))
            return outputs
        visit = self._next(owner)
        # Dynamo may have traced a block again, for a guard on anything: what the caches and the
        # history hold must be of one and the same model
        if visit is None or not self._alike(block, visit.block):
            raise Diverged(f"block call {self._visited - 1} is not the one of the first forward")
        if not block.has(self.prunable):
            return list(block.dense(*inputs))  # of other tokens, such as text
        programs = block.planned(self.prunable)
        if self.kind == "probe":
            return programs.probe(inputs)
        outputs = self._run(programs, inputs, visit)
        if self.measures:
            *outputs, importance = outputs
            total = self.importance
            self.importance = importance if total is None else total + importance
        return outputs

    def finish(self) -> None:
        """Raise Diverged if blocks were left out: their caches hold what nobody wrote."""
        if self._visited != len(self.known):
            raise Diverged(f"{self._visited} block calls, not {len(self.known)} as in the first")

    def _next(self, owner: int) -> Visit | None:
        """The visit of the first forward at this place, if it was one of the same owner."""
        index, self._visited = self._visited, self._visited + 1
        known = index < len(self.known) and self.known[index].owner == owner
        return self.known[index] if known else None

    def _alike(self, block: Block, other: Block) -> bool:
        if block is other:
            return True
        prunable = [b.has(self.prunable) for b in (block, other)]
        if block.work != other.work or prunable[0] != prunable[1]:
            return False
        if not any(prunable):
            return True
        try:
            mine, theirs = (
                [(slot.shape, slot.dtype) for slot in b.planned(self.prunable).slots]
                for b in (block, other)
            )
        except Unsupported:
            return False
        return mine == theirs

    def _run(
        self, programs: ProgramsOfBlock, inputs: Sequence[object], visit: Visit
    ) -> list[Tensor]:
        """Outputs, and importance if it is measured."""
        assert visit.before is not None
        count = len(programs.slots)
        mine, self.caches = self.caches[:count], self.caches[count:]
        if self.kind == "dense":
            return programs.dense(inputs, mine, visit.before)
        assert self.active is not None
        before = visit.before if self.measures else None
        return programs.selective(inputs, mine, self.active, before)


@contextmanager
def under(call: RootCall) -> Iterator[RootCall]:
    """Blocks called in here, in this thread or task, belong to `call`."""
    token = _CALL.set(call)
    try:
        yield call
    finally:
        _CALL.reset(token)


def is_attached() -> bool:
    """Whether a root is under way in this thread or task, which answers for all that it runs."""
    return _CALL.get() is not None


def identities(parameters: Iterable[object]) -> frozenset[int]:
    """By which a call of a block is known to be one of a root's."""
    return frozenset(map(id, parameters))
