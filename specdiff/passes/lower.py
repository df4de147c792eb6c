"""Lower: the programs of a plan, each emitted and compiled when it is first run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, fx

from specdiff.passes.emit import emit_dense, emit_tail
from specdiff.passes.rows import emit_selective
from specdiff.passes.selective import SelectivePlan
from specdiff.program import Evaluation, Signature

Executable = Callable[[Sequence[Any]], Sequence[Tensor]]
Emit = Callable[[], fx.GraphModule]
Compiler = Callable[[str, fx.GraphModule, Sequence[Any]], Executable]
"""(name of the program, its graph, inputs to compile it for) -> what runs it."""


class LoweredPrograms:
    """Implements `specdiff.program.Programs` by compiling emitted graphs."""

    def __init__(
        self,
        module: fx.GraphModule,
        plan: SelectivePlan,
        signature: Signature,
        sample: int,
        compiler: Compiler,
    ) -> None:
        self._module = module
        self._plan = plan
        self._signature = signature
        self._sample = sample
        self._compiler = compiler
        self._executables: dict[str, Executable] = {}
        self._seconds: dict[str, float] = {}

    @property
    def signature(self) -> Signature:
        """What the programs take and give."""
        return self._signature

    @property
    def compile_seconds(self) -> Mapping[str, float]:
        """Seconds spent emitting and compiling each program built so far."""
        return self._seconds

    def probe(self, inputs: Sequence[object]) -> Evaluation:
        """Every token, no cache."""
        return Evaluation(*self._run("probe", self._emit(emit_dense, False), inputs))

    def dense(self, inputs: Sequence[object], caches: Sequence[Tensor]) -> Evaluation:
        """Every token, caches overwritten."""
        return Evaluation(*self._run("dense", self._emit(emit_dense, True), [*inputs, *caches]))

    def selective(
        self, inputs: Sequence[object], caches: Sequence[Tensor], active: Tensor
    ) -> Evaluation:
        """K active tokens; one program for each K."""
        count = active.shape[1]
        emit = self._emit(emit_selective, count)
        return Evaluation(*self._run(f"selective_{count}", emit, [*inputs, *caches, active]))

    def tail(self, inputs: Sequence[object], tokens: Tensor) -> list[Tensor]:
        """The graph's outputs."""
        emit = partial(emit_tail, self._module, self._plan)
        return list(self._run("tail", emit, [*inputs, tokens]))

    def _emit(self, emitter: Callable[..., fx.GraphModule], *which: int) -> Emit:
        return partial(emitter, self._module, self._plan, self._sample, *which)

    def _run(self, name: str, emit: Emit, values: Sequence[Any]) -> Sequence[Tensor]:
        if name not in self._executables:
            start = time.perf_counter()
            self._executables[name] = self._compiler(name, emit(), values)
            self._seconds[name] = time.perf_counter() - start
        return self._executables[name](values)
