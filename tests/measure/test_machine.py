"""The rates of a machine: work over time, measured once, and a bound by the slower of two."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from specdiff.measure import timing
from specdiff.measure.machine import MachineRates, measure_rates


def test_rates_are_work_over_the_best_time_but_the_first(monkeypatch):
    products, copies = [0.1, 4.0, 2.0, 3.0, 3.0, 3.0], [0.1, 5.0, 5.0, 4.0, 5.0, 5.0]
    steps = itertools.chain(*((1.0, seconds) for seconds in products + copies))
    ticks = itertools.accumulate(steps)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    with FlopCounterMode(display=False) as counter:
        rates = measure_rates.__wrapped__("cpu", torch.float32)
    assert rates.flops_per_second == pytest.approx(counter.get_total_flops() / len(products) / 2)
    assert rates.bytes_per_second == pytest.approx(2 * 2**28 / 4)  # read and written


def test_rates_are_measured_once():
    assert measure_rates("cpu", torch.float32) is measure_rates("cpu", torch.float32)


def test_the_slower_of_work_and_traffic_bounds_a_program():
    rates = MachineRates(flops_per_second=100.0, bytes_per_second=10.0)
    assert rates.seconds(200, 1) == 2
    assert rates.seconds(1, 200) == 20


def test_whole_numbers_have_no_matrix_rate():
    with pytest.raises(ValueError, match="floating-point"):
        measure_rates("cpu", torch.int64)
