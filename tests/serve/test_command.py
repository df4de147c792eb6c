"""`specdiff serve` as a shell runs it."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi", reason='serving needs pip install -e ".[serve]"')

import specdiff
from specdiff.cli.main import main
from specdiff.errors import SpecdiffError
from specdiff.models.picture_model import Order, PictureModel, load_picture_model
from specdiff.serve.start import Wish
from tests.examples.small import flux_folder
from tests.serve.served import alone, ask, pixels, read, until

COMMAND = "from specdiff.cli.main import main; main()"


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    """What the command says before it exits with 2."""
    monkeypatch.setattr("sys.argv", ["specdiff", "serve", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_be_served_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(monkeypatch, capsys, "--quality", "best")
    assert "--quality: must be one of dense, closest" in said
    assert "the folder of a diffusers pipeline" in refused(monkeypatch, capsys, "nothing")


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = refused(monkeypatch, capsys)
    assert 'fastapi is missing: specdiff serve needs pip install -e ".[serve]"' in said


def test_artifacts_without_compiling_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--compile" in refused(monkeypatch, capsys, "--artifacts", "programs")


def test_settings_of_serve_are_read_as_text() -> None:
    wish = Wish.of_text({"target": "x", "running": "2", "compile": "true", "artifacts": "file"})
    assert wish == Wish("x", running=2, compile=True, artifacts="file")
    for wrong in ({"runing": "2"}, {"running": "two"}, {"compile": "1"}):
        with pytest.raises(SpecdiffError, match="expected"):
            Wish.of_text(wrong)


@pytest.mark.slow  # compiles two programs in each of two processes: a minute
def test_a_compiled_server_hands_its_programs_on(tmp_path: Path) -> None:
    """It draws what an engine without a compiler draws; another process compiles nothing."""
    folder, artifacts = flux_folder(tmp_path / "flux"), tmp_path / "programs"
    body = {"prompt": "a red apple", "size": "32x32", "steps": 12, "seed": 3}
    compiled = ["--compile", "--artifacts", str(artifacts), "--port", "8468"]
    with cached(tmp_path / "first"), server(str(folder), *compiled) as process:
        until(lambda: is_ready(8468) and artifacts.exists(), 900)
        status, drawn, _ = ask(8468, body)
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert status == 200
    order = Order("a red apple", 32, 32, 12, 3)
    expected = alone(attached(load_picture_model(str(folder), torch.device("cpu"))), order)
    assert (pixels(drawn["data"][0]).int() - expected.int()).abs().max() <= 1
    command = [sys.executable, "-m", "tests.serve.compiled", str(folder), str(artifacts)]
    with cached(tmp_path / "second"):
        other = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(other.stdout.splitlines()[-1])
    assert found["not_ready"] == ""
    assert found["misses"] == 0 < found["hits"]


def attached(model: PictureModel) -> PictureModel:
    specdiff.attach(model.denoiser)
    return model


@contextmanager
def cached(folder: Path) -> Iterator[None]:
    """Processes started meanwhile have Inductor's cache there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        yield


def server(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", COMMAND, "serve", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_server_listens_on_this_machine_alone(tmp_path: Path) -> None:
    """A real process: started, asked, interrupted."""
    folder = flux_folder(tmp_path / "flux")
    command = [sys.executable, "-c", COMMAND, "serve", str(folder), "--port", "8467"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        until(lambda: is_ready(8467), 240)
        addresses = listening(process.pid, 8467)
        status = ask(8467, {"prompt": "a red apple", "size": "32x32", "steps": 4})[0]
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert status == 200
    assert addresses == {"0100007F"}  # 127.0.0.1


def is_ready(port: int) -> bool:
    try:
        return read(port, "/readyz")[0] == 200
    except OSError:
        return False


def listening(pid: int, port: int) -> set[str]:
    """Addresses that listen on a port, as the kernel writes them."""
    lines = [
        line
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
    ]
    ended = rf"([0-9A-F]+):{port:04X} \S+ 0A "  # 0A: listens
    return {found[1] for line in lines if (found := re.search(ended, line))}
