"""The page in a headless browser: a picture comes back through it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(needed, reason='serving needs pip install -e ".[serve]"')
api = pytest.importorskip("playwright.sync_api", reason="a browser needs pip install playwright")

from specdiff.models.picture_model import load_folder, of_pipeline  # noqa: E402
from specdiff.serve.app import create_app  # noqa: E402
from specdiff.serve.drawing import Local  # noqa: E402
from specdiff.serve.engine import Engine  # noqa: E402
from tests.examples.small import flux_folder  # noqa: E402
from tests.serve.served import serving, until  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no browser: apt-get install chromium")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.slow
def test_a_picture_comes_back_through_the_page(browser: Any, tmp_path: Path) -> None:
    loaded = of_pipeline(load_folder(flux_folder(tmp_path), torch.device("cpu")), "tiny")
    engine = Engine(replace(loaded, side=32))
    with serving(create_app(Local(engine), close=engine.close)) as port:
        page = browser.new_page()
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: line.type == "error" and wrong.append(line.text))
        page.goto(f"http://127.0.0.1:{port}/")
        page.fill("[name=steps]", "60")
        page.fill("[name=n]", "2")
        page.click("#draw")
        page.wait_for_function("0 < progress.value && progress.value < 1")
        assert "of 60" in page.inner_text("#said")
        page.wait_for_selector("#pictures img >> nth=1")
        page.wait_for_function("document.querySelector('img').naturalWidth == 32")
        assert page.evaluate("progress.value") == 1
        assert not wrong

        page.fill("[name=size]", "33x33")
        page.click("#draw")
        page.wait_for_selector("#said.wrong")
        assert "multiples of 4" in page.inner_text("#said")

        page.fill("[name=size]", "32x32")
        page.fill("[name=steps]", "200")
        page.click("#draw")
        page.wait_for_function("progress.value > 0")
        page.click("#stop")
        page.wait_for_function("said.textContent == 'stopped'")
        until(lambda: not engine.counts().running)
