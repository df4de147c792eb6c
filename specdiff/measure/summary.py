"""The figures of a comparison, as a table for people and as a JSON record for programs."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from specdiff.measure.comparison import Comparison, Trials
from specdiff.measure.memory import MEBIBYTE
from specdiff.plan import Plan

SCHEMA = 1
"""Number of the JSON record's layout; grows when a field changes its meaning or goes away."""
BUSY = 0.5
"""Load per core before the measurement above which times are not worth reporting."""

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


def _finite(value: float, digits: int = 4) -> float | None:
    """JSON knows no infinity: equal pictures have no PSNR."""
    return round(value, digits) if math.isfinite(value) else None


def plain(options: Mapping[str, object]) -> dict[str, Json]:
    """Options that are set, as JSON takes them."""
    return {name: _plain(value) for name, value in options.items() if value is not None}


def _plain(value: object) -> Json:
    if isinstance(value, Plan):
        return value.to_json()
    return value if isinstance(value, bool | int | float | str | dict) else str(value)


def _pictures(comparison: Comparison, trials: Trials) -> list[Json]:
    return [
        {
            "prompt": request.prompt,
            "seed": request.seed,
            "seconds": [round(second, 4) for second in seconds],
            "psnr_db": _finite(quality.psnr),
            "ssim": _finite(quality.ssim),
        }
        for request, seconds, quality in zip(
            comparison.requests, trials.seconds, trials.qualities, strict=True
        )
    ]


def _method_record(comparison: Comparison, trials: Trials) -> dict[str, Json]:
    return {
        "name": trials.method.name,
        "options": plain(trials.method.options),
        "steps": trials.method.steps,
        "seconds_median": _finite(trials.median_seconds),
        "speedup": _finite(comparison.speedup(trials)),
        "psnr_db": _finite(trials.psnr),
        "ssim": _finite(trials.ssim),
        "tokens_share": _finite(comparison.tokens_share(trials)),
        "cache_bytes": trials.cache_bytes,
        "compile_seconds": _finite(trials.compile_seconds),
        "program_seconds": {name: _finite(s) for name, s in trials.program_seconds.items()},
        "fallbacks": dict(trials.fallbacks),
        "pictures": _pictures(comparison, trials),
    }


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict[str, Json]:
    """Date, versions and machine of a measurement."""
    is_cuda = device.type == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": _installed("diffusers"),
        "specdiff": _installed("specdiff"),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if is_cuda else str(device),
    }


def load_per_core() -> float:
    """Processes that want to run, per core, over the last minute; this one's own included."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


def record(
    comparison: Comparison, device: torch.device, repeats: int, load: float
) -> dict[str, Json]:
    """Everything measured, as a value that `json.dump` takes.

    Args:
        comparison: What was measured.
        device: Where it ran.
        repeats: Rounds behind each median.
        load: `load_per_core` before the measurement: what others were doing.

    Returns:
        `environment`, `repeats` and `methods`, the reference first. Times are seconds, PSNR is in
        dB and null for equal pictures, `tokens_share` is relative to the reference.
    """
    return {
        "schema": SCHEMA,
        "environment": environment(device),
        "repeats": repeats,
        "load_per_core_before": round(load, 2),
        "methods": [_method_record(comparison, trials) for trials in comparison.trials],
    }


def _cells(comparison: Comparison, trials: Trials) -> list[str]:
    is_reference = trials is comparison.reference
    psnr = f"{trials.psnr:.1f} dB" if math.isfinite(trials.psnr) else "equal"
    return [
        trials.method.name,
        f"{trials.median_seconds:.2f} s",
        f"{comparison.speedup(trials):.2f}x",
        "" if is_reference else psnr,
        "" if is_reference else f"{trials.ssim:.3f}",
        f"{comparison.tokens_share(trials):.0%}",
        f"{trials.cache_bytes / MEBIBYTE:.1f} MiB" if trials.cache_bytes else "",
        f"{trials.compile_seconds:.1f} s" if trials.method.compiles else "",
    ]


def table(comparison: Comparison) -> Table:
    """The same figures for a terminal, one row a method, 80 columns wide."""
    reference = comparison.reference
    pictures = len(comparison.requests) * len(reference.seconds[0])
    title = (
        f"{reference.method.steps} steps; medians of {pictures} pictures a method;"
        f" PSNR and SSIM against {reference.method.name}"
    )
    caption = "compile: once per model, less where Inductor's cache on disk has the program"
    result = Table(title=title, caption=caption, box=SIMPLE_HEAD, collapse_padding=True)
    result.title_justify = result.caption_justify = "left"
    result.add_column("method", no_wrap=True)
    for heading in ("time", "speedup", "PSNR", "SSIM", "tokens", "cache", "compile"):
        result.add_column(heading, justify="right", no_wrap=True)
    for trials in comparison.trials:
        result.add_row(*_cells(comparison, trials))
    return result


def warnings(comparison: Comparison, load: float) -> list[str]:
    """Warnings for the reader of the figures: a busy machine, steps that ran dense and why."""
    hints = [
        f"{trials.method.name}: {count} steps ran dense: {reason}"
        for trials in comparison.trials
        for reason, count in trials.fallbacks.items()
    ]
    if load > BUSY:
        hints.append(
            f"other processes keep this machine busy (load {load:.1f} a core):"
            " do not trust the times"
        )
    return hints
