"""Dumps: code after each pass that runs and agrees with the model; and that they stop nothing."""

from __future__ import annotations

import json
import logging
import os
import runpy
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import networkx
import pytest
import torch
from torch import Tensor, fx, nn

import specdiff
from specdiff import pipeline, torch_adapter
from specdiff.compiler import specdiff_backend
from specdiff.inspect import export
from specdiff.passes.base import PassRecord
from specdiff.passes.graph.dump import Dump
from specdiff.plan import Plan
from tests.models import flux

PASSES = [
    "00_dynamo",
    "01_normalize",
    "02_axes",
    "03_select",
    "04_timetable",
    "05_invariant",
    "06_regions",
]
PROGRAMS = [
    "07_program_dense",
    "08_program_tail",
    "09_program_selective_21_measured",
]
OPTIONS = {
    "inner_backend": "eager",
    "plan": Plan.every(4, warmup=2, lookahead=0),
    "cache_ratio": 0.5,
}


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Any], steps: int = 3, **options: Any) -> list[Any]:
    """A few steps of an Euler sampler; returns the flat inputs of the last call and its output."""
    calls: list[Any] = []

    def backend(module, values):
        compiled = specdiff_backend(module, values, options={**OPTIONS, **options})

        def call(*flat):
            calls.append((flat, compiled(*flat)))
            return calls[-1][1]

        return call

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    latent = inputs["hidden_states"]
    for index in range(steps):
        time = torch.full_like(inputs["timestep"], 1 - index / steps)
        call = {**inputs, "hidden_states": latent, "timestep": time}
        latent = latent - compiled(**call)[0] / steps
    return [calls, model(**call)[0]]


@pytest.fixture(scope="module")
def dumped(tmp_path_factory):
    """The folder of one graph, the flat inputs of its last call, and what the model says of it."""
    folder = tmp_path_factory.mktemp("dump")
    calls, expected = run(*flux(1, 1), dump_dir=folder)
    assert [path.name for path in folder.iterdir()] == ["graph_0"]
    return folder / "graph_0", calls, expected


def load(file: Path) -> dict[str, Any]:
    return runpy.run_path(str(file))


def test_every_pass_and_program_has_its_file(dumped):
    folder, _, _ = dumped
    names = {path.stem for path in folder.glob("*.py")}
    assert names == {*PASSES, *PROGRAMS}
    assert {path.stem for path in folder.glob("*.diff")} == names - {"00_dynamo"}


@pytest.mark.parametrize("name", PASSES)
def test_code_after_each_pass_is_the_model(dumped, name):
    folder, calls, expected = dumped
    code = load(folder / f"{name}.py")
    flat, _ = calls[-1]
    (output,) = code["forward"](code["constants"], *flat)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*PASSES, *PROGRAMS])
def test_code_makes_its_own_inputs_when_run(dumped, name, capsys):
    folder, _, _ = dumped
    runpy.run_path(str(folder / f"{name}.py"), run_name="__main__")
    assert "torch.Size([2, " in capsys.readouterr().out


def test_code_of_the_programs_is_what_ran(dumped):
    folder, calls, expected = dumped
    codes = {name.split("_", 2)[2]: load(folder / f"{name}.py") for name in PROGRAMS}

    def call(name: str, *values: Any) -> Any:
        return codes[name]["forward"](codes[name]["constants"], *values)

    flat, _ = calls[-1]
    caches = [torch.zeros_like(c) for c in codes["dense"]["inputs"]()[len(flat) :]]
    tokens, importance = call("dense", *flat, *caches)
    (whole,) = call("tail", *flat, tokens)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)
    assert importance.shape == (2, 42)
    before, after = calls[-2][0], calls[-1][0]
    call("dense", *before, *caches)
    # what ran last was selective: where it computed, the code says the same
    active = torch.arange(21).expand(2, -1)
    stale = [cache.clone() for cache in caches]
    some, _ = call("selective_21_measured", *after, *caches, active)
    assert some.shape == (2, 21, 8)
    assert any(not torch.equal(old, new) for old, new in zip(stale, caches, strict=True))
    every, _ = call("dense", *after, *caches)
    near = (some - every[:, :21]).norm() / every[:, :21].norm()
    assert 0 < near < 0.1


def test_the_head_says_where_code_comes_from(dumped):
    folder, _, _ = dumped
    heads = {name: (folder / f"{name}.py").read_text().split("\n", 1)[0] for name in PASSES}
    for name, head in heads.items():
        step = name.split("_", 1)[1]
        assert head.startswith(f'"""{step}: ') and " nodes; " in head
    assert "segments of tokens: s0 of 42, s1 of 4" in heads["02_axes"]
    assert "42 prunable tokens" in heads["03_select"]
    program = (folder / "09_program_selective_21_measured.py").read_text().split("\n", 1)[0]
    assert "index_put_" in program


def test_notes_stand_above_what_they_are_about(dumped):
    lines = (dumped[0] / "06_regions.py").read_text().splitlines()
    index = next(i for i, line in enumerate(lines) if " linear: " in f" {line.strip()}")
    assert lines[index - 3 : index] == [
        "    # axes: [B, s0, 32]",
        "    # select: rows",
        "    # regions: 0 embed x_embedder",
    ]


def test_differences_between_neighbours_are_what_a_pass_added(dumped):
    text = (dumped[0] / "03_select.diff").read_text()
    added = [line[1:] for line in text.splitlines() if line.startswith("+") and "+++" not in line]
    assert text.startswith("--- 02_axes.py\n+++ 03_select.py\n")
    assert all(line.startswith(("    # select: ", '"""select: ')) for line in added)
    assert len(added) > 100


def test_drawings_and_report_lie_beside_the_code(dumped):
    folder, _, _ = dumped
    for name in ("regions", "block"):
        graph = networkx.read_graphml(folder / f"{name}.graphml")
        assert (folder / f"{name}.dot").read_text().count("fillcolor") == len(graph) > 8
        if shutil.which("dot"):
            root = xml.etree.ElementTree.parse(folder / f"{name}.svg").getroot()
            drawn = [e for e in root.iter() if e.get("class", "").startswith("node")]
            assert len(drawn) == len(graph)
    assert json.loads((folder / "report.json").read_text())["selective"] is True
    assert "What was found" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_each_graph_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDIFF_DUMP", str(tmp_path / "by" / "environment"))
    model, inputs = flux(1, 0, rows=2, columns=3, batch=1)
    for _ in range(2):
        torch._dynamo.reset()
        run(model, inputs, steps=1)
    folders = sorted(path.name for path in (tmp_path / "by" / "environment").iterdir())
    assert folders == ["graph_0", "graph_1"]


def test_the_option_wins_over_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDIFF_DUMP", str(tmp_path / "environment"))
    run(*flux(1, 0, rows=2, columns=3, batch=1), steps=1, dump_dir=tmp_path / "option")
    assert [path.name for path in tmp_path.iterdir()] == ["option"]


def test_a_place_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    blocking = tmp_path / "file"
    blocking.touch()
    model, inputs = flux(1, 0, rows=4, columns=5, batch=1)
    with caplog.at_level(logging.WARNING, logger="specdiff"):
        run(model, inputs, dump_dir=blocking / "dump")
    assert "nothing is dumped" in caplog.text
    assert specdiff.stats(model).selective == 1


def test_a_fault_in_a_drawing_stops_nothing(tmp_path, caplog, monkeypatch):
    def broken(*_: Any) -> str:
        raise RuntimeError("no such colour")

    monkeypatch.setattr(export, "to_svg", broken)
    model, inputs = flux(1, 0, rows=4, columns=5, batch=1)
    with caplog.at_level(logging.WARNING, logger="specdiff"):
        run(model, inputs, dump_dir=tmp_path)
    assert "not complete" in caplog.text and "no such colour" in caplog.text
    assert specdiff.stats(model).selective == 1
    assert (tmp_path / "graph_0" / "09_program_selective_10_measured.py").exists()


def test_a_fault_in_a_trace_stops_nothing(caplog, monkeypatch):
    def broken(*_: Any) -> str:
        raise RuntimeError("no such name")

    monkeypatch.setattr(pipeline, "to_python", broken)
    monkeypatch.setattr(torch_adapter, "traces_artifacts", lambda: True)
    monkeypatch.setattr(torch_adapter, "trace_artifact", lambda name, text: None)
    model, inputs = flux(1, 0, rows=4, columns=5, batch=1)
    with caplog.at_level(logging.WARNING, logger="specdiff"):
        run(model, inputs)
    assert "no such name" in caplog.text
    assert specdiff.stats(model).selective == 1


def test_no_trace_is_written_unasked():
    """Pytest, too, listens: every test would draw every graph, and keep what it drew."""
    model, inputs = flux(layers=1)
    run(torch.compile(model, backend=specdiff.backend(**OPTIONS)), inputs, steps=1)
    assert not torch_adapter.traces_artifacts()


def test_constants_of_a_graph_are_stored_beside_it(tmp_path):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    module, x = fx.symbolic_trace(Scaled()), torch.ones(2, 3)
    record = PassRecord("graph", 0.0, 3, 3, "a graph")
    Dump(tmp_path).observe(record, module, {})
    code = load(tmp_path / "00_graph.py")
    torch.testing.assert_close(code["forward"](code["constants"], x), module(x))


PROGRAM = """
import torch
from tests.models import flux
model, inputs = flux(1, 1, rows=4, columns=5, batch=1)
plan = {"specdiff_plan": 1, "rule": {"warmup": 2}}
options = {"inner_backend": "eager", "plan": plan, "cache_ratio": 0.5}
compiled = torch.compile(model, backend="specdiff", fullgraph=True, options=options)
with torch.no_grad():
    for index in range(4):
        inputs["timestep"] = torch.full_like(inputs["timestep"], 1 - index / 4)
        inputs["hidden_states"] = inputs["hidden_states"] - compiled(**inputs)[0] / 4
"""


@pytest.mark.slow
def test_torch_logs_and_torch_trace(tmp_path):
    """Decisions are logged once each; code, drawings and report are artifacts for tlparse."""
    environment = {**os.environ, "TORCH_LOGS": "+specdiff", "TORCH_TRACE": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True, text=True, check=True, env=environment,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    said = [line for line in result.stderr.splitlines() if "specdiff/" in line]
    for decision in (
        "normalize: ", "segments of tokens: s0 of 20", "20 prunable tokens", "1 attention+mlp",
        "has a selective form", "program_dense: ", "program_selective_10_measured: ",
    ):  # fmt: skip
        assert sum(decision in line for line in said) == 1, (decision, result.stderr)
    (log,) = tmp_path.glob("*.log")
    text = log.read_text()
    for name in (
        *PASSES,
        "regions.graphml",
        "block.dot",
        "report.json",
        "program_selective_10_measured",
    ):
        artifact = f'"name": "specdiff_{name.split("_", 1)[1] if name in PASSES else name}"'
        assert text.count(artifact) == 1, name
    assert "# regions: 0 embed x_embedder" in text
