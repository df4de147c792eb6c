"""`specdiff eval` as a whole, on a toy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from specdiff.cli import app
from specdiff.errors import SpecdiffError
from tests.evaluation.toy import toy_subject


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdiff.evaluation.command.find_subject", lambda *named: toy_subject())


def evaluated(out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["eval", "--out", str(out), "--large-set", "0", *arguments])


def test_the_command_measures_and_reports(tmp_path: Path) -> None:
    methods = ("dense", "7 steps", "FirstBlockCache 0.1")
    result = evaluated(tmp_path, "--pictures", "1", *(f"--method={name}" for name in methods))
    assert result.exit_code == 0, result.output
    assert result.output.rstrip().endswith("complete")
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["plan"]["pictures"], found["plan"]["pairs"]) == (1, 1)
    assert len(found["methods"]["7 steps"]["values"]["seconds_each"]) == 1
    table = (tmp_path / "table.md").read_text()
    assert "7 steps" in table and "Linear has no enable_cache" in table
    assert (tmp_path / "frontier.png").stat().st_size > 0


def test_more_pairs_than_pictures_are_refused(tmp_path: Path) -> None:
    error = evaluated(tmp_path, "--pictures", "1", "--pairs", "2").exception
    assert isinstance(error, SpecdiffError)
    assert str(error) == "pairs=2: must be at most the pictures, pictures=1"
