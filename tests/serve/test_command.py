"""`specdiff serve` as a shell runs it."""

from __future__ import annotations

import importlib.util
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason='serving needs pip install -e ".[serve]"')

from specdiff.cli.main import main
from specdiff.errors import SpecdiffError
from specdiff.serve.start import Wish
from tests.examples.small import flux_folder
from tests.serve.served import ask, read, until

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


def test_settings_of_serve_are_read_as_text() -> None:
    wish = Wish.of_text({"target": "x", "running": "2", "max_cache_bytes": "0"})
    assert wish == Wish("x", running=2, max_cache_bytes=0)
    for wrong in ({"runing": "2"}, {"running": "two"}):
        with pytest.raises(SpecdiffError, match="expected"):
            Wish.of_text(wrong)


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
