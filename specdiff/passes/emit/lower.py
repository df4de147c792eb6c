"""Lower: emit and compile each program of a selection when it is first run."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx

from specdiff.errors import Fault, Unsupported, described
from specdiff.passes.base import PassRecord
from specdiff.passes.emit.importance import observed
from specdiff.passes.emit.rows import emit_block_selective, emit_selective
from specdiff.passes.emit.whole import (
    emit_block_dense,
    emit_block_probe,
    emit_dense,
    emit_probe,
    emit_tail,
    emit_timetable,
    emit_timetable_row,
)
from specdiff.passes.emit.without_text import emit_without_text, joins_text
from specdiff.passes.graph.python_file import op_counts
from specdiff.passes.select.selection import Selection
from specdiff.passes.select.signature import cache_slots
from specdiff.program import TIMES_AT_ONCE, CacheSlot, Evaluation, Signature

log = logging.getLogger(__name__)

Executable = Callable[[Sequence[Any]], Sequence[Tensor]]
Emit = Callable[[], fx.GraphModule]
ProgramCompiler = Callable[[str, fx.GraphModule, Sequence[Any]], Executable]
"""(name of the program, its graph, example inputs) -> what runs it."""
TIMETABLE = "timetable"
"""The beginning of the names of programs that fill tables."""
TIMETABLE_ROW = f"{TIMETABLE}_row"


class Lowered:
    """The programs of one selection, by name, each compiled when it is first run."""

    def __init__(
        self, module: fx.GraphModule, selection: Selection, sample: int, compiler: ProgramCompiler
    ) -> None:
        self._module = module
        self._selection = selection
        self._sample = sample
        self._compiler = compiler
        self._executables: dict[str, Executable] = {}
        self._seconds: dict[str, float] = {}

    @property
    def compile_seconds(self) -> Mapping[str, float]:
        """Seconds spent emitting and compiling each program built so far."""
        return self._seconds

    def _emit(
        self, emitter: Callable[..., fx.GraphModule], *which: int, importance: bool = True
    ) -> Emit:
        sample = self._sample if importance else 0
        return partial(emitter, self._module, self._selection, sample, *which)

    def _run(self, name: str, emit: Emit, values: Sequence[Any]) -> Sequence[Tensor]:
        if name in self._executables:
            return self._executables[name](values)
        start = time.perf_counter()
        try:
            executable = self._build(name, emit, values)
            seconds = time.perf_counter() - start
            results = executable(values)
        except (Unsupported, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise Fault(f"no program {name!r}: {described(error)}") from error
        self._executables[name], self._seconds[name] = executable, seconds
        return results

    def _build(self, name: str, emit: Emit, values: Sequence[Any]) -> Executable:
        start = time.perf_counter()
        program = emit()
        program.meta["record"] = self._record(name, program, time.perf_counter() - start)
        return self._compiler(name, program, values)

    def _record(self, name: str, program: fx.GraphModule, seconds: float) -> PassRecord:
        """What emitting a program did, for dumps."""
        before, after = (Counter(op_counts(m.graph)) for m in (self._module, program))
        changes = [f"+{n} {op}" for op, n in (after - before).items()]
        changes += [f"-{n} {op}" for op, n in (before - after).items()]
        return PassRecord(
            f"program_{name}",
            seconds,
            len(self._module.graph.nodes),
            len(program.graph.nodes),
            ", ".join(changes) or "the same ops",
        )


class LoweredPrograms(Lowered):
    """The `specdiff.program.Programs` of a graph, compiled from emitted graphs."""

    def __init__(
        self,
        module: fx.GraphModule,
        selection: Selection,
        signature: Signature,
        sample: int,
        compiler: ProgramCompiler,
    ) -> None:
        super().__init__(module, selection, sample, compiler)
        self._signature = signature
        self.omits_text = joins_text(selection)
        """Whether `text=False` has an effect; the first such run may find that it has none."""

    @property
    def signature(self) -> Signature:
        """As `Programs.signature`."""
        return self._signature

    def probe(self, inputs: Sequence[object]) -> Tensor:
        """As `Programs.probe`."""
        (tokens,) = self._run("probe", partial(emit_probe, self._module, self._selection), inputs)
        return tokens

    def dense(self, inputs: Sequence[object], caches: Sequence[Tensor]) -> Evaluation:
        """As `Programs.dense`."""
        return Evaluation(*self._run("dense", self._emit(emit_dense), [*inputs, *caches]))

    def tabulate(
        self, inputs: Sequence[object], caches: Sequence[Tensor], later: Sequence[Tensor] = ()
    ) -> None:
        """As `Programs.tabulate`; a single time costs a single row."""
        values = [*inputs, *caches]
        if not later:
            emit = partial(emit_timetable_row, self._module, self._selection)
            self._run(TIMETABLE_ROW, emit, values)
            return
        times = [self._signature.time_input(inputs), *later]
        missing = TIMES_AT_ONCE - len(times)
        values.append(torch.stack([*times, *[times[-1]] * missing]))
        self._run(TIMETABLE, partial(emit_timetable, self._module, self._selection), values)

    def selective(
        self,
        inputs: Sequence[object],
        caches: Sequence[Tensor],
        active: Tensor,
        text: bool = True,
        importance: bool = True,
        row: int | None = None,
    ) -> Evaluation:
        """As `Programs.selective`: one program for each K, with or without text and importance."""
        count, values = active.shape[1], [*inputs, *caches, active]
        if self._selection.timetable is not None:
            values.append(self._row(inputs, caches, row))
        if not text and self.omits_text:
            try:
                emit = self._emit(emit_without_text, count, importance=importance)
                return Evaluation(
                    *self._run(named_for("textless", count, importance), emit, values)
                )
            except Unsupported as reason:
                log.warning("text_steps='dense' has no effect: %s", reason)
                self.omits_text = False
        emit = self._emit(emit_selective, count, importance=importance)
        return Evaluation(*self._run(named_for("selective", count, importance), emit, values))

    def _row(self, inputs: Sequence[object], caches: Sequence[Tensor], row: int | None) -> Tensor:
        """int64 [1]: `row`, or else row 0, filled for the time of `inputs`."""
        if row is None:
            self.tabulate(inputs, caches)
        return self._rows[row or 0, :1]

    @cached_property
    def _rows(self) -> Tensor:
        """int64 [TIMES_AT_ONCE, 2]: the number of each row, on the device, aligned to 16 bytes."""
        rows = torch.arange(TIMES_AT_ONCE, device=self._signature.tokens.device)
        return rows.unsqueeze(1).repeat(1, 2)

    def tail(self, inputs: Sequence[object], tokens: Tensor) -> list[Tensor]:
        """As `Programs.tail`."""
        emit = partial(emit_tail, self._module, self._selection)
        return list(self._run("tail", emit, [*inputs, tokens]))


class BlockPrograms(Lowered):
    """The programs of one block: each returns the graph's own outputs, then importance [B, N].

    The probe measures no importance, nor does a selective run without `before`. `before`, int64
    [1], is the number of the model's attentions before this block.
    """

    @cached_property
    def slots(self) -> tuple[CacheSlot, ...]:
        """The caches of one call of the block."""
        return cache_slots(self._selection)

    @cached_property
    def attentions(self) -> int:
        """Number of the block's attentions that importance is measured from."""
        return observed(self._selection)

    def probe(self, inputs: Sequence[object]) -> list[Tensor]:
        """Compute every token; no cache, no importance."""
        emit = partial(emit_block_probe, self._module, self._selection)
        return list(self._run("block_probe", emit, inputs))

    def dense(
        self, inputs: Sequence[object], caches: Sequence[Tensor], before: Tensor
    ) -> list[Tensor]:
        """Compute every token; overwrite the caches."""
        emit = self._emit(emit_block_dense)
        return list(self._run("block_dense", emit, [*inputs, *caches, before]))

    def selective(
        self,
        inputs: Sequence[object],
        caches: Sequence[Tensor],
        active: Tensor,
        before: Tensor | None,
    ) -> list[Tensor]:
        """Compute K active tokens: one program for each K, with or without importance."""
        count, importance = active.shape[1], before is not None
        emit = self._emit(emit_block_selective, count, importance=importance)
        values = [*inputs, *caches, active, *([before] if importance else ())]
        name = named_for("block_selective", count, importance)
        return list(self._run(name, emit, values))


def named_for(kind: str, count: int, importance: bool) -> str:
    """The name of a program for K = `count` active tokens."""
    return f"{kind}_{count}" + "_measured" * importance
