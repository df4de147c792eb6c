"""`specdiff verify` from the shell: what it prints, writes and exits with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specdiff.cli.main import main
from specdiff.evaluation import gate
from specdiff.evaluation.gate import Floors, Gate, Likeness
from specdiff.models.picture_model import Order
from specdiff.oracles.verification import Verification
from tests.examples.small import flux_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux_folder(tmp_path_factory.mktemp("flux"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a red apple\n\na frog\n")
    return file


def verify(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["specdiff", "verify", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def verdict(
    monkeypatch: pytest.MonkeyPatch, folder: Path, prompts: Path, *arguments: object
) -> tuple[int, dict[str, Any]]:
    file = prompts.parent / "verdict.json"
    usual = (folder, "--prompts", prompts, "--size", "32x32", "--steps", 12, "--json", file)
    return verify(monkeypatch, *usual, *arguments), json.loads(file.read_text())


@pytest.mark.parametrize("oracles", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_pipeline_passes_a_floor_that_it_reaches(
    monkeypatch: pytest.MonkeyPatch, folder: Path, prompts: Path, oracles: bool
) -> None:
    if not oracles:
        monkeypatch.setattr(gate, "_verified", lambda *_: Verification(()))
    status, found = verdict(monkeypatch, folder, prompts, "--floor", 20)
    assert status == 0
    assert found["passed"]
    assert found["oracles"]["passed"]
    assert found["oracles"]["selective"] == oracles
    assert [each["prompt"] for each in found["pictures"]] == ["a red apple", "a frog"]
    assert found["steps"]["skipped"] > 0
    assert found["steps"]["dense"] + found["steps"]["skipped"] == 2 * 12
    assert 20 <= found["psnr_db"]["worst"] <= found["psnr_db"]["mean"]


@pytest.mark.parametrize(
    ("floors", "reasons"),
    [
        (Floors(35, 35), []),
        (Floors(36, 36), ["the worst picture has 35.0 dB of 36"]),
        (Floors(30, 41), ["the mean is 40.0 dB of 41"]),
    ],
)
def test_a_floor_holds_for_the_worst_picture_and_for_the_mean(
    floors: Floors, reasons: list[str]
) -> None:
    order = Order("a red apple", 32, 32, 8, 0)
    judged = Gate("", Verification(()), floors, [Likeness(order, 35.0), Likeness(order, 45.0)])
    assert list(judged.failures) == judged.record()["failures"] == reasons
    broken = Gate("", Verification(()), floors, [Likeness(order, float("nan"))])
    assert len(broken.failures) == 2


def test_a_pipeline_fails_a_floor_that_it_does_not_reach(
    monkeypatch: pytest.MonkeyPatch, folder: Path, prompts: Path
) -> None:
    monkeypatch.setattr(gate, "_verified", lambda *_: Verification(()))
    status, found = verdict(monkeypatch, folder, prompts, "--floor", 200)
    assert status == 1
    assert not found["passed"]


def test_dense_pictures_are_equal(
    monkeypatch: pytest.MonkeyPatch, folder: Path, prompts: Path
) -> None:
    monkeypatch.setattr(gate, "_verified", lambda *_: Verification(()))
    status, found = verdict(monkeypatch, folder, prompts, "--floor", 200, "--quality", "dense")
    assert status == 0
    assert found["psnr_db"] == {"worst": None, "mean": None}


@pytest.mark.slow
def test_a_function_gives_a_pipeline_or_a_model(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path, prompts: Path
) -> None:
    file = tmp_path / "build.py"
    file.write_text(
        f"""
import torch
from diffusers import FluxPipeline

def pipeline():
    return FluxPipeline.from_pretrained({str(folder)!r}, dtype=torch.float32)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)
    def forward(self, sample, timestep):
        return self.layer(sample) * timestep

def model():
    return Model(), {{"sample": torch.randn(1, 4, 8), "timestep": torch.ones(1)}}

def neither():
    return 3
"""
    )
    usual = ("--prompts", prompts, "--size", "32x32", "--steps", 4, "--floor", 1)
    assert verify(monkeypatch, f"{file}:pipeline", *usual) == 0
    assert verify(monkeypatch, f"{file}:model") == 0
    assert verify(monkeypatch, f"{file}:model", "--prompts", prompts) == 2
    assert verify(monkeypatch, f"{file}:neither") == 2


@pytest.mark.parametrize(
    ("target", "reason"),
    [("nothing", "expected demo, the folder"), (".", "no pipeline there")],
)
def test_a_target_that_is_none_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: str, reason: str
) -> None:
    assert verify(monkeypatch, target) == 2
    assert reason in capsys.readouterr().err


def test_pickles_are_not_read(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    prompts: Path,
) -> None:
    pickle = flux_folder(tmp_path / "flux") / "transformer" / "diffusion_pytorch_model.safetensors"
    pickle.rename(pickle.with_suffix(".bin"))
    assert verify(monkeypatch, tmp_path / "flux", "--prompts", prompts) == 2
    assert "is a pickle, which may run code" in capsys.readouterr().err


def test_a_picture_that_cannot_be_drawn_is_said_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, prompts: Path
) -> None:
    assert verify(monkeypatch, folder, "--prompts", prompts, "--size", "33x32") == 2
    assert "multiples of 4" in capsys.readouterr().err
    assert verify(monkeypatch, folder) == 2
    assert "--prompts names a file" in capsys.readouterr().err
