"""Machine: how fast it multiplies and copies, which bounds the time of any program."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from specdiff.errors import SpecdiffError
from specdiff.measure.timing import timed

REPEATS = 5
SIDE = {"cpu": 1024}
"""Rows and columns of the matrices, by device type."""
ACCELERATOR_SIDE = 8192
COPIED_BYTES = 1 << 28
"""Many times what any cache holds."""


@dataclass(frozen=True)
class MachineRates:
    """The rates that one device reaches on large matrices and long copies."""

    flops_per_second: float
    """Of a square matrix product; a multiplication and an addition count as two."""
    bytes_per_second: float
    """Of a copy; what is read and what is written both count."""

    def seconds(self, flops: float, moved: float) -> float:
        """Least time of a program with these FLOPs and bytes of memory traffic."""
        return max(flops / self.flops_per_second, moved / self.bytes_per_second)


@functools.cache
def measure_rates(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> MachineRates:
    """Measure a device, once a process for each device and dtype; half a second on two cores.

    Each rate is the best of a few runs after one to warm up: a bound, not an average.

    Args:
        device: Where to measure.
        dtype: A floating-point type; the matrix product is in it.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}: expected a floating-point type")
    place = torch.device(device)
    side = SIDE.get(place.type, ACCELERATOR_SIDE)
    left, right = (torch.randn(side, side, device=place, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=place)
    target = torch.zeros_like(source)
    multiply = _best(lambda: torch.mm(left, right, out=product), place)
    copy = _best(lambda: target.copy_(source), place)
    return MachineRates(2 * side**3 / multiply, 2 * COPIED_BYTES / copy)


def _best(work: Callable[[], object], place: torch.device) -> float:
    """Seconds of the fastest of a few runs, the first left out."""
    return min([timed(work, place)[1] for _ in range(1 + REPEATS)][1:])


def usable_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        SpecdiffError: There is none, or torch cannot use it here.
    """
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:
        raise SpecdiffError(f"no device {name!r} here: {error}") from error
