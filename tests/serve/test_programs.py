"""A served model that is compiled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import specdiff
from specdiff.models.picture_model import (
    Order,
    PictureModel,
    load_folder,
    load_picture_model,
    of_pipeline,
)
from specdiff.serve.engine import Engine
from specdiff.serve.programs import FOLDER, compile_into
from tests.examples.small import flux_folder
from tests.serve.served import alone, ask, pixels, until
from tests.serve.test_command import COMMAND, is_ready
from tests.serve.test_engine import CPU, drawn


class Compiled:
    """A compiler that compiles nothing and counts."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: fx.GraphModule, inputs: Any) -> Any:
        self.graphs += 1
        return module.forward


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def tiny(folder: Path) -> PictureModel:
    return of_pipeline(load_folder(folder, CPU), "flux")


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stays in the environment."""
    monkeypatch.setenv(FOLDER, "elsewhere")


def test_once_it_is_ready_nothing_is_compiled(tmp_path: Path) -> None:
    """Other sizes, lengths and batches draw with the programs of the first pictures."""
    folder, compiler = flux_folder(tmp_path / "flux"), Compiled()
    orders = [Order("a red apple", side, 32, 6, seed) for seed in (1, 2, 3) for side in (32, 48)]
    exact = Engine(tiny(folder), running=6)
    expected = drawn(exact, *orders)
    exact.close()
    model = tiny(folder)
    compile_into(str(tmp_path / "programs"), model.denoiser, backend=compiler)
    engine = Engine(model, running=6)
    assert "being drawn" in engine.why_not_ready()
    engine.warm_up()
    assert not engine.why_not_ready()
    compiled = compiler.graphs
    assert compiled > 0
    events = drawn(engine, *orders)
    assert compiler.graphs == compiled
    assert [each[-1].png for each in events] == [each[-1].png for each in expected]
    engine.close()


def test_a_model_that_names_no_blocks_is_compiled_whole(tmp_path: Path) -> None:
    compiler, whole = Compiled(), Doubled()
    compile_into(str(tmp_path), whole, backend=compiler)
    whole(torch.zeros(3, 2))
    assert compiler.graphs == 1
    assert os.environ[FOLDER] == str(tmp_path)


def test_a_first_picture_that_fails_is_said(tmp_path: Path) -> None:
    def broken(module: fx.GraphModule, inputs: Any) -> Any:
        raise ValueError("no compiler")

    model = tiny(flux_folder(tmp_path / "flux"))
    compile_into(str(tmp_path), model.denoiser, backend=broken)
    engine = Engine(model, running=1)
    engine.warm_up()
    assert "the first picture failed: BackendCompilerFailed" in engine.why_not_ready()
    engine.close()


@pytest.mark.slow  # Inductor, in a process for each start: a minute
def test_the_next_start_builds_nothing(tmp_path: Path) -> None:
    folder, programs = flux_folder(tmp_path / "flux"), tmp_path / "programs"
    order = Order("a red apple", 32, 32, 12, 3)
    exact = load_picture_model(str(folder), CPU)
    specdiff.attach(exact.denoiser)
    expected = alone(exact, order).int()
    body = {"prompt": order.prompt, "size": "32x32", "steps": order.steps, "seed": order.seed}
    built: list[set[Path]] = []
    for _ in range(2):
        with served(str(folder), "--compile", str(programs)) as port:
            status, drawn_, _ = ask(port, body)
        assert status == 200
        assert (pixels(drawn_["data"][0]).int() - expected).abs().max() <= 1
        built.append(set(programs.rglob("*.so")))
    assert built[0] == built[1] != set()


@contextmanager
def served(*arguments: str, port: int = 8468) -> Iterator[int]:
    """A real process that is ready."""
    command = [sys.executable, "-c", COMMAND, "serve", *arguments, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            until(lambda: is_ready(port), 900)
            yield port
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
