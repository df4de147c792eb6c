"""`specdiff eval` and `specdiff tune` as a whole, on toys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from specdiff.cli.main import app
from specdiff.errors import SpecdiffError
from specdiff.plan import Plan
from tests.evaluation.toy import flux_subject, toy_subject


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdiff.evaluation.command.find_subject", lambda *named: toy_subject())
    monkeypatch.setattr("specdiff.evaluation.tuning.find_subject", lambda *named: flux_subject())


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


def tuned(out: Path, *arguments: str) -> Result:
    small = (
        "--prompts",
        "1",
        "--held-back",
        "1",
        "--steps",
        "6",
        "--option",
        "inner_backend=eager",
    )
    return CliRunner().invoke(app, ["tune", "--out", str(out), *small, *arguments])


def test_the_command_tunes(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    result = tuned(out, "--target", "20", "--budget", "60", "--option", "forecast=reuse")
    assert result.exit_code == 0, result.output
    plan = Plan.load(out)
    assert len(plan.ratios) == 6 and len(plan.dense) < 6
    assert plan.settings == {"forecast": "reuse"}
    assert plan.notes["score"] >= 20 and plan.notes["score_held_back"]
    assert plan.notes["evaluations_spent"] <= 60 + 2 * 6  # the check is beside the budget


@pytest.mark.slow
def test_the_command_tunes_to_the_solution(tmp_path: Path) -> None:
    result = tuned(tmp_path / "plan.json", "--solution", "--budget", "60")
    assert result.exit_code == 0, result.output
    assert "to_solution: mean" in result.output and "to_dense: mean" in result.output


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--budget", "1"), "budget=1: must be at least 6, for 1 dense pictures"),
        (("--target", "nan"), "target=nan: must be a finite number"),
        (("--target", "999"), "target not reached within the budget, "),
    ],
)
def test_what_cannot_be_tuned_saves_no_plan(
    tmp_path: Path, given: tuple[str, ...], message: str
) -> None:
    error = tuned(tmp_path / "plan.json", *given).exception
    assert isinstance(error, SpecdiffError) and str(error).startswith(message)
    assert not (tmp_path / "plan.json").exists()
