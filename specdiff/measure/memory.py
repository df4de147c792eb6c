"""Peak memory: on CUDA what torch allocated, elsewhere (on Linux) what this process held."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

KIBIBYTE = 2**10
MEBIBYTE = 2**20
PROCESS = Path("/proc/self")


def held(device: torch.device) -> int | None:
    """Bytes held now; None where this is unknown."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return _status("VmRSS")


def peak(device: torch.device) -> int | None:
    """Bytes held at the peak since `reset_peak`; None where this is unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _status("VmHWM")


def reset_peak(device: torch.device) -> None:
    """Count the peak from here on, where that is possible."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")


def _status(field: str) -> int | None:
    try:
        lines = (PROCESS / "status").read_text().splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(values[0]) * KIBIBYTE if values else None
