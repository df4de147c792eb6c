"""Bench: dense under `torch.compile` against specdiff at several cache ratios, on random weights.

One process, the methods taking turns (A B A B), real sampling loops, medians. Every program is also
timed by itself, beside its floor: the larger of its FLOPs over the matrix rate of the machine and
its bytes over the copy rate (`specdiff.measure.machine`, `specdiff.passes.select.cost`).
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

import specdiff
from specdiff import torch_adapter
from specdiff.bench.geometries import Sampler
from specdiff.errors import SpecdiffError, Unsupported
from specdiff.inspect.explaining import explain
from specdiff.measure.machine import MachineRates
from specdiff.measure.memory import peak, reset_peak
from specdiff.measure.timing import in_turns, timed
from specdiff.options import Options
from specdiff.passes.emit.lower import TIMETABLE, TIMETABLE_ROW, named_for
from specdiff.passes.select.cost import Sizes
from specdiff.passes.select.regions import dense_work, selective_work
from specdiff.pipeline import Analysis
from specdiff.program import Evaluation, Programs
from specdiff.runtime.step.dispatch import Runtime
from specdiff.runtime.streams.registry import find_or_create

Result = TypeVar("Result")


@dataclass(frozen=True)
class Program:
    """One compiled program of a method, run by itself."""

    name: str
    calls: int
    """In one run of the sampler."""
    seconds: float
    """Median of these calls."""
    floor: float | None
    """Least seconds that its FLOPs and bytes take on this machine."""
    compile_seconds: float


@dataclass
class Trial:
    """What was measured of one method."""

    ratio: float
    """Share of tokens that its selective steps leave out; 0: the dense model."""
    compiled: Any
    first_seconds: float = 0.0
    """Of the run that compiles it."""
    seconds: list[float] = field(default_factory=list)
    """Of every run since."""
    programs: tuple[Program, ...] = ()
    peak_bytes: int | None = None
    """Of device memory, on a CPU of the process; None where it is unknown."""
    cache_bytes: int = 0

    @property
    def median(self) -> float:
        """Seconds of a run."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class BenchResult:
    """Everything measured of one geometry; the first trial is the dense model."""

    sampler: Sampler
    rates: MachineRates
    trials: Sequence[Trial]

    def speedup(self, trial: Trial) -> float:
        """Median of dense over the trial's own."""
        return self.trials[0].median / trial.median


class TimedPrograms:
    """Programs that note how long each call took; each waits for the device."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self.signature = programs.signature
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @property
    def compile_seconds(self) -> Mapping[str, float]:
        """Of the programs themselves."""
        return self._programs.compile_seconds

    def probe(self, inputs: Sequence[object]) -> Tensor:
        """As `Programs.probe`."""
        return self._timed("probe", lambda: self._programs.probe(inputs))

    def dense(self, inputs: Sequence[object], caches: Sequence[Tensor]) -> Evaluation:
        """As `Programs.dense`."""
        return self._timed("dense", lambda: self._programs.dense(inputs, caches))

    def selective(
        self,
        inputs: Sequence[object],
        caches: Sequence[Tensor],
        active: Tensor,
        text: bool = True,
        importance: bool = True,
        row: int | None = None,
    ) -> Evaluation:
        """As `Programs.selective`."""
        name = named_for("selective" if text else "textless", active.shape[1], importance)
        arguments = inputs, caches, active, text, importance, row
        return self._timed(name, lambda: self._programs.selective(*arguments))

    def tabulate(
        self, inputs: Sequence[object], caches: Sequence[Tensor], later: Sequence[Tensor] = ()
    ) -> None:
        """As `Programs.tabulate`."""
        name = TIMETABLE if later else TIMETABLE_ROW
        self._timed(name, lambda: self._programs.tabulate(inputs, caches, later))

    def tail(self, inputs: Sequence[object], tokens: Tensor) -> list[Tensor]:
        """As `Programs.tail`."""
        return self._timed("tail", lambda: self._programs.tail(inputs, tokens))

    def _timed(self, name: str, work: Callable[[], Result]) -> Result:
        device = self.signature.tokens.device
        result, seconds = timed(work, device)
        self.seconds[name].append(seconds)
        return result


def measure(
    sampler: Sampler,
    rates: MachineRates,
    ratios: Sequence[float],
    repeats: int,
    options: Mapping[str, Any],
    mode: str | None = None,
    on_run: Callable[[str], None] = lambda text: None,
    backend: str = "inductor",
) -> BenchResult:
    """Run every method twice to compile it, then `repeats` times in turns, then program by program.

    Args:
        sampler: what runs.
        rates: of its device and dtype.
        ratios: of specdiff; the dense model comes first by itself.
        repeats: runs behind each median.
        options: of specdiff, on top of each ratio; settings of Inductor among them are for all.
        mode: of `torch.compile`, for all methods.
        on_run: called before each run with a line for a progress bar.
        backend: of the dense model.
    """
    _, inductor = Options.parse(options, torch_adapter.inductor_keys())
    inductor = torch_adapter.inductor_settings(inductor, mode)
    torch.compiler.reset()
    device = sampler.noise.device
    trials = [Trial(0.0, compiled(sampler, backend, inductor))]
    rewritten = compiled(sampler, "specdiff", {**options, **inductor})
    trials += [Trial(ratio, rewritten) for ratio in ratios]
    for group in (trials[:1], trials[1:]):
        with torch_adapter.cold_caches():
            for trial in group:
                on_run(f"compiling {label(trial)}")
                trial.first_seconds = timed(partial(run, sampler, trial), device)[1]
                reset_peak(device)
                run(sampler, trial)  # where CUDA graphs are recorded
                trial.peak_bytes = peak(device)
    turns = in_turns(
        trials,
        range(1, repeats + 1),
        lambda trial, number: run(sampler, trial),
        device,
        before=lambda trial, number: on_run(f"round {number}: {label(trial)}"),
    )
    for trial, _, _, seconds in turns:
        trial.seconds.append(seconds)
    analysis = analysed(sampler)
    for trial in trials[1:]:
        on_run(f"programs of {label(trial)}")
        trial.programs = programs_of(sampler, trial, analysis, rates)
    return BenchResult(sampler, rates, trials)


def type_of(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of that name, or the usual one of a device. Raises SpecdiffError for another."""
    dtype = getattr(torch, name or ("float32" if device.type == "cpu" else "bfloat16"), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise SpecdiffError(f"no floating-point dtype {name!r}")
    return dtype


def label(trial: Trial) -> str:
    """A method's name."""
    return f"specdiff at {trial.ratio:g}" if trial.ratio else "dense"


def compiled(sampler: Sampler, backend: str, options: Mapping[str, Any]) -> Any:
    """The model under one backend; nothing is compiled yet."""
    return torch.compile(sampler.model, backend=backend, fullgraph=True, options=dict(options))


def run(sampler: Sampler, trial: Trial) -> None:
    """One run by one method.

    The next run uses the same caches, as in a pipeline: CUDA graphs need the same addresses.
    """
    if not trial.ratio:
        sampler.run(trial.compiled)
        return
    times = sampler.timesteps()
    with specdiff.session(trial.compiled, timesteps=times, cache_ratio=trial.ratio):
        sampler.run(trial.compiled)
        trial.cache_bytes = specdiff.stats(trial.compiled).cache_bytes


def programs_of(
    sampler: Sampler, trial: Trial, analysis: Analysis, rates: MachineRates
) -> tuple[Program, ...]:
    """Time each program of one more run by itself."""
    runtime = runtime_of(trial)
    programs = runtime.programs
    runtime.programs = watched = TimedPrograms(programs)
    try:
        run(sampler, trial)
    finally:
        runtime.programs = programs
    return tuple(
        Program(
            name,
            len(seconds),
            statistics.median(seconds),
            floor(name, analysis, rates),
            programs.compile_seconds.get(name, 0.0),
        )
        for name, seconds in watched.seconds.items()
    )


def runtime_of(trial: Trial) -> Runtime:
    """The runtime of a method that has run."""
    graphs = list(find_or_create(trial.compiled).graphs)
    return next(graph for graph in graphs if isinstance(graph, Runtime))


def floor(name: str, analysis: Analysis, rates: MachineRates) -> float | None:
    """The least time of a program; None where its cost is not known.

    The floor of a program without text is that of a model without text.
    """
    if name == "tail" or name.startswith(TIMETABLE):
        return None
    kind, *active = name.split("_")
    count = int(active[0]) if active else None
    work = selective_work(analysis.regions) if active else dense_work(analysis.regions)
    sizes = Sizes.of(analysis.selection)
    if kind == "textless":
        sizes = replace(sizes, text=0)
    return rates.seconds(sizes.evaluate(work.flops, count), sizes.evaluate(work.moved, count))


def analysed(sampler: Sampler) -> Analysis:
    """The analysis of the model. Raises Unsupported if it would run dense."""
    report = explain(sampler.model, **sampler.first_call())
    if report.analysis is None:
        raise Unsupported(report.reason)
    return report.analysis
