"""The figures of a comparison, as JSON and as a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from specdiff.measure import summary
from specdiff.measure.comparison import Comparison, compare
from specdiff.plan import Plan
from tests.measure.standins import REQUESTS, stand_ins


@pytest.fixture(name="comparison")
def _comparison() -> Comparison:
    return compare(stand_ins(), REQUESTS, repeats=2)


def test_record_is_strict_json_with_all_methods(comparison: Comparison) -> None:
    text = json.dumps(summary.record(comparison, torch.device("cpu"), 2, 0.1), allow_nan=False)
    figures = json.loads(text)
    assert figures["environment"]["torch"] == torch.__version__
    assert {"date", "device", "processor", "cores"} <= figures["environment"].keys()
    names = [method["name"] for method in figures["methods"]]
    assert names == ["dense", "specdiff", "paper", "dense, 2 steps"]
    dense, default, paper, _ = figures["methods"]
    assert dense["psnr_db"] is None and default["psnr_db"] > paper["psnr_db"]
    assert paper["options"] == {"cache_ratio": 0.5, "method": "paper"}
    assert default["program_seconds"] == {"dense": 1.5}
    assert [len(one["seconds"]) for one in default["pictures"]] == [2, 2]


def test_plans_are_recorded_as_their_files_are() -> None:
    options = {"plan": Plan.tapered(3), "cache_ratio": 0.9, "dump_dir": Path("x"), "quality": None}
    rule = {"specdiff_plan": 1, "rule": {"tapered": 3}}
    assert summary.plain(options) == {"plan": rule, "cache_ratio": 0.9, "dump_dir": "x"}


def test_table_names_every_method(comparison: Comparison) -> None:
    console = Console()
    with console.capture() as captured:
        console.print(summary.table(comparison))
    printed = captured.get()
    for words in ("dense", "specdiff", "paper", "dense, 2 steps", "3.0 MiB", "50%"):
        assert words in printed


def test_steps_that_ran_dense_and_a_busy_machine_are_told(comparison: Comparison) -> None:
    told = [f"{name}: 2 steps ran dense: a NaN" for name in ("specdiff", "paper")]
    assert summary.warnings(comparison, load=0.1) == told
    assert "do not trust the times" in summary.warnings(comparison, load=3.0)[-1]
