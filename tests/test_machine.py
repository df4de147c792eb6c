"""The rates of a machine: of the right size, measured once, and a bound by the slower of two."""

from __future__ import annotations

import pytest
import torch

from specdiff.machine import MachineRates, measure_rates


def test_rates_are_those_of_a_computer_and_measured_once():
    rates = measure_rates("cpu", torch.float32)
    assert 1e8 < rates.flops_per_second < 1e15
    assert 1e8 < rates.bytes_per_second < 1e13
    assert measure_rates("cpu", torch.float32) is rates


def test_the_slower_of_work_and_traffic_bounds_a_program():
    rates = MachineRates(flops_per_second=100.0, bytes_per_second=10.0)
    assert rates.seconds(200, 1) == 2
    assert rates.seconds(1, 200) == 20


def test_whole_numbers_have_no_matrix_rate():
    with pytest.raises(ValueError, match="floating-point"):
        measure_rates("cpu", torch.int64)
