"""The scripts that show how specdiff is used, run as they are, on small random weights."""

from __future__ import annotations

import importlib.util
import io
import re
import threading
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.request import urlopen

import pytest
from PIL import Image

from tests.examples.small import flux_folder, sd3_folder

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL: dict[str, Any] = {"size": 32, "steps": 12, "inner_backend": "eager"}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def side_of(png: bytes) -> int:
    with Image.open(io.BytesIO(png)) as image:
        assert image.width == image.height
        return image.width


@pytest.fixture(scope="module")
def flux_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(flux_folder(tmp_path_factory.mktemp("flux")))


def test_flux(
    flux_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    script("flux").main(flux_model, "a red apple", **SMALL)
    assert side_of(Path("flux.png").read_bytes()) == SMALL["size"]
    told = capsys.readouterr().out
    assert re.search(r"12 evaluations: 9 dense, 0 selective, 3 skipped", told), told
    assert "dense by guard: never" in told


def test_sd3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    script("sd3").main(str(sd3_folder(tmp_path / "model")), "a red apple", **SMALL)
    assert side_of(Path("sd3.png").read_bytes()) == SMALL["size"]
    told = capsys.readouterr().out
    assert re.search(r"12 evaluations: 10 dense, 0 selective, 2 skipped", told), told
    assert "dense by guard: never" in told


def test_server(flux_model: str) -> None:
    """Two requests at a time, of one prompt, each in a session of its own."""
    server = script("server").server(flux_model, port=0, **SMALL)
    serving = threading.Thread(target=server.serve_forever, daemon=True)
    serving.start()
    pictures: list[bytes] = []

    def ask() -> None:
        address = f"http://localhost:{server.server_address[1]}/a%20red%20apple"
        with urlopen(address, timeout=120) as answer:
            pictures.append(answer.read())

    try:
        clients = [threading.Thread(target=ask) for _ in range(2)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
    finally:
        server.shutdown()
        server.server_close()
        serving.join()
    assert [side_of(one) for one in pictures] == [SMALL["size"]] * 2
