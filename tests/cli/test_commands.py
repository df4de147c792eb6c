"""The commands, run as a shell would; the real demo is marked slow."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import specdiff
from specdiff.cli.common import make_folders, parse_options
from specdiff.cli.main import main
from specdiff.errors import OptionError
from specdiff.inspect import target
from tests.measure.standins import stand_ins


def test_options_are_read_as_literals_or_text() -> None:
    options = parse_options(["cache_ratio=0.9", "method=paper"])
    assert options == {"cache_ratio": 0.9, "method": "paper"}


@pytest.mark.parametrize(
    "pair", ["cache_ration=0.9", "cache_ratio", "cache_ratio=many", "mode=nosuch"]
)
def test_wrong_options_are_refused(pair: str) -> None:
    with pytest.raises(OptionError, match=r"cache_ratio|mode='nosuch': must be one of 'default'"):
        parse_options([pair])


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command as a shell would and return its exit status."""
    monkeypatch.setattr("sys.argv", ["specdiff", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_the_version_is_that_of_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == specdiff.__version__ == version("specdiff")


def test_a_wrong_option_stops_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, "demo", "--option", "cache_ration=0.9") == 2
    assert "cache_ratio" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_stops_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    blocking = tmp_path / "file"
    blocking.touch()
    assert run_cli(monkeypatch, "demo", "--out", str(blocking / "demo.png")) == 2
    assert "cannot write" in capsys.readouterr().err
    assert run_cli(monkeypatch, "demo", "--json", str(tmp_path)) == 2
    assert "is a folder" in capsys.readouterr().err
    if Path("/proc").is_dir():  # where even root makes no file
        assert run_cli(monkeypatch, "explain", "demo", "--html", "/proc/page.html") == 2
        assert "cannot write /proc/page.html" in capsys.readouterr().err


def test_files_that_can_be_written_are_left_as_they_are(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "folder" / "new"
    old.write_text("kept")
    make_folders([old, new])
    assert old.read_text() == "kept"
    assert new.parent.is_dir() and not new.exists()


def test_demo_writes_picture_and_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("specdiff.measure.methods.demo_methods", lambda setting, fewer: stand_ins())
    monkeypatch.setattr("specdiff.models.subject.Subject.embed", lambda self, requests: None)
    out, figures = tmp_path / "new" / "demo.png", tmp_path / "demo.json"
    files = ["--out", str(out), "--json", str(figures)]
    assert run_cli(monkeypatch, "demo", "a red apple", "a cat", "--repeats", "1", *files) == 0
    assert out.stat().st_size > 0
    pictures = json.loads(figures.read_text())["methods"][0]["pictures"]
    assert [one["prompt"] for one in pictures] == ["a red apple", "a cat"]


MODEL = """
from tests.models import flux

def build():
    return flux(1, 0, rows=4, columns=5, batch=1)

def wrong():
    return flux

def unfit():
    model, inputs = build()
    return model, {"hidden_states": inputs["hidden_states"]}

def misshapen():
    model, inputs = build()
    return model, {**inputs, "hidden_states": inputs["hidden_states"][..., :3]}
"""


@pytest.fixture(name="model_file")
def _model_file(tmp_path: Path) -> Path:
    file = tmp_path / "model.py"
    file.write_text(MODEL)
    return file


def test_explain_writes_page_and_figures(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model_file: Path,
) -> None:
    page, figures = tmp_path / "new" / "page.html", tmp_path / "figures.json"
    files = ["--html", str(page), "--json", str(figures), "--option", "cache_ratio=0.5"]
    assert run_cli(monkeypatch, "explain", f"{model_file}:build", "--steps", "9", *files) == 0
    assert "encoder_hidden_states" in capsys.readouterr().out
    assert "FluxTransformer2DModel" in page.read_text()
    found = json.loads(figures.read_text())
    assert found["sizes"] == {"B": 1, "N": 20, "T": 4}
    assert len(found["schedule"]) == 9
    assert found["prediction"]["dense"] > found["prediction"]["selective"] > 0


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("model", "expected demo, package.module:function or file.py:function"),
        ("no_such_module:build", "cannot import no_such_module"),
        ("no_such_file.py:build", "cannot import no_such_file.py"),
        ("FILE:absent", "has no function absent"),
        ("FILE:wrong", "must return a model and a dict of its inputs"),
        ("json:dumps", "must be a function that needs no arguments"),
        ("FILE:unfit", "FluxTransformer2DModel does not run on its inputs: "),
        ("FILE:misshapen", "FluxTransformer2DModel does not run on its inputs: RuntimeError: mat1"),
    ],
)
def test_explain_names_what_is_wrong_with_a_target(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_file: Path,
    named: str,
    message: str,
) -> None:
    assert run_cli(monkeypatch, "explain", named.replace("FILE", str(model_file))) == 2
    assert message in capsys.readouterr().err


def test_demo_writes_a_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_file: Path
) -> None:
    call = target.load_target(f"{model_file}:build", torch.device("cpu"))
    monkeypatch.setattr("specdiff.inspect.target.demo_call", lambda device: call)
    monkeypatch.setattr("specdiff.measure.methods.demo_methods", lambda setting, fewer: stand_ins())
    monkeypatch.setattr("specdiff.models.subject.Subject.embed", lambda self, requests: None)
    page = tmp_path / "new" / "page.html"
    files = ["--out", str(tmp_path / "demo.png"), "--report", str(page)]
    assert run_cli(monkeypatch, "demo", "a red apple", "--repeats", "1", *files) == 0
    assert "a red apple" in page.read_text()


@pytest.mark.slow
def test_real_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out, file = tmp_path / "demo.png", tmp_path / "demo.json"
    page = tmp_path / "demo.html"
    files = ["--out", str(out), "--json", str(file), "--report", str(page)]
    assert run_cli(monkeypatch, "demo", "--repeats", "1", "--fewer-steps", "14", *files) == 0
    assert page.read_text().count('class="viewer"') == 2 * len(
        json.loads(file.read_text())["methods"][0]["pictures"]
    )
    figures = json.loads(file.read_text())
    dense, default, paper, shorter = figures["methods"]
    assert dense["tokens_share"] == 1
    # 3 dB below what was measured on these prompts
    for method, tokens, fidelity in ((default, 0.4, 39), (paper, 0.3, 21)):
        assert 0 < method["tokens_share"] < tokens
        assert method["psnr_db"] > fidelity
    assert default["cache_bytes"] == 0 < paper["cache_bytes"]  # the default computes no part
    assert shorter["steps"] == 14
    assert out.stat().st_size > 10_000
