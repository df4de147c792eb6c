"""What the device does in each program of a bench geometry: kernels by time, and the gaps.

    python examples/research/profile_programs.py flux-dev --depth 0.1 --device cuda

Each program is profiled at its second call of one run, when nothing compiles any more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from specdiff import torch_adapter
from specdiff.bench.geometries import build
from specdiff.bench.measure import TimedPrograms, Trial, compiled, run, runtime_of, type_of
from specdiff.cli.common import parse_options
from specdiff.measure.machine import usable_device
from specdiff.measure.timing import timed
from specdiff.models.subject import quiet_libraries
from specdiff.program import Programs

Result = TypeVar("Result")
PROFILED_CALL = 2
WIDTH = 90
"""Letters of a kernel's name."""


class ProfiledPrograms(TimedPrograms):
    """Programs that profile one call of each."""

    def __init__(self, programs: Programs) -> None:
        super().__init__(programs)
        self.calls: Counter[str] = Counter()
        self.profiles: dict[str, tuple[profile, float]] = {}

    def _timed(self, name: str, work: Callable[[], Result]) -> Result:
        self.calls[name] += 1
        device = self.signature.tokens.device
        if self.calls[name] != PROFILED_CALL:
            return work()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            result, seconds = timed(work, device)
        self.profiles[name] = found, seconds
        return result


def table(console: Console, name: str, found: profile, seconds: float, rows: int) -> None:
    """Print the longest kernels (ops, on a CPU) of one call."""
    events = found.key_averages()
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    time = "self_device_time_total" if on_device else "self_cpu_time_total"
    longest = sorted(on_device or events, key=lambda e: getattr(e, time), reverse=True)
    busy = sum(getattr(e, time) for e in longest) / 1e3
    count = sum(e.count for e in longest)
    console.print(f"\n{name}: {seconds * 1e3:.2f} ms, busy {busy:.2f} ms, {count} kernels")
    for event in longest[:rows]:
        took = getattr(event, time) / 1e3
        console.print(f"{took:9.3f} ms {event.count:5} x {event.key[:WIDTH]}", soft_wrap=True)


def main(
    geometry: Annotated[str, typer.Argument(help="As of `specdiff bench`.")] = "flux-cpu",
    depth: Annotated[float, typer.Option(help="Share of the model's blocks.")] = 1.0,
    ratio: Annotated[float, typer.Option(help="The cache ratio.")] = 0.95,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    mode: Annotated[str | None, typer.Option(help="Of torch.compile.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="name=value, repeatable.")] = None,
    rows: Annotated[int, typer.Option(help="Kernels to show of each program.")] = 15,
) -> None:
    """Profile one run."""
    quiet_libraries()
    place = usable_device(device)
    sampler = build(geometry, place, type_of(None, place), 12, depth)
    settings: dict[str, Any] = {
        **torch_adapter.mode_settings(mode),
        "method": "paper",
        **parse_options(option or []),
    }
    trial = Trial(ratio, compiled(sampler, "specdiff", settings))
    for _ in range(2):
        run(sampler, trial)
    runtime = runtime_of(trial)
    runtime.programs = watched = ProfiledPrograms(runtime.programs)
    run(sampler, trial)
    console = Console(highlight=False, width=WIDTH + 30)
    for name, (found, seconds) in watched.profiles.items():
        table(console, name, found, seconds, rows)


if __name__ == "__main__":
    typer.run(main)
