"""`specdiff bench`: what it measures of a model of toy size, and the pages it writes."""

from __future__ import annotations

import json
import runpy

import pytest
import torch
from typer.testing import CliRunner

from specdiff.bench import geometries
from specdiff.bench import measure as bench_measure
from specdiff.bench.geometries import GEOMETRIES, Geometry, build
from specdiff.bench.measure import TimedPrograms, measure
from specdiff.bench.record import markdown, record
from specdiff.cli.main import app
from specdiff.errors import OptionError, SpecdiffError
from specdiff.measure.machine import MachineRates
from specdiff.measure.memory import peak, reset_peak
from specdiff.settings import QUALITIES

SMALL = {
    "flux-toy": Geometry("flux", 1, 1, 2, 32, 4, 3, prompt_width=8, pooled_width=8),
    "sd3-toy": Geometry("sd3", 1, 0, 2, 16, 4, 3, prompt_width=8, pooled_width=8),
}
OTHERS = {
    "qwen-toy": Geometry("qwen", 1, 0, 2, 32, 4, 3, prompt_width=8),
    "wan-toy": Geometry("wan", 1, 0, 2, 32, 4, 3, prompt_width=8, frames=2),
}
RATES = MachineRates(flops_per_second=1e12, bytes_per_second=1e9)
EAGER = {"inner_backend": "eager", "method": "paper"}


@pytest.fixture(autouse=True)
def _toys(monkeypatch):
    monkeypatch.setattr(geometries, "GEOMETRIES", {**GEOMETRIES, **SMALL, **OTHERS})


def toy(name):
    return build(name, torch.device("cpu"), torch.float32, steps=6)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n == "flux-toy" else n for n in SMALL],
)
def test_every_program_is_counted_and_has_a_floor(name):
    bench = measure(toy(name), RATES, [0.75], 2, EAGER, backend="eager")
    dense, trial = bench.trials
    assert [len(dense.seconds), len(trial.seconds)] == [2, 2]
    assert bench.speedup(dense) == 1
    calls = {program.name: program.calls for program in trial.programs}
    # three steps and one look ahead; 16 image tokens, a quarter of them computed
    assert calls == {"dense": 4, "selective_4_measured": 3, "tail": 6}
    floors = {program.name: program.floor for program in trial.programs}
    assert floors["tail"] is None
    assert 0 < floors["selective_4_measured"] < floors["dense"]
    assert trial.cache_bytes > 0
    page = markdown(record(name, bench, EAGER, 0.0))
    assert "| specdiff at 0.75 |" in page
    assert "| selective_4_measured | 0.75 |" in page


@pytest.mark.parametrize("name", OTHERS)
def test_geometries_of_other_families_run(name):
    sampler = toy(name)
    latent = sampler.run(sampler.model)
    assert latent.shape == sampler.noise.shape and latent.isfinite().all()


@pytest.mark.slow  # 90 s: Inductor compiles two models
def test_the_presets_are_measured(tmp_path):
    script = runpy.run_path("examples/bench/presets.py")
    out = tmp_path / "presets.json"
    script["main"](["sd3-toy", "qwen-toy"], device="cpu", steps=12, rounds=1, out=out)
    figures = json.loads(out.read_text())["geometries"]
    assert set(figures) == {"sd3-toy", "qwen-toy"}
    for methods in figures.values():
        assert methods["dense"]["speedup"] == 1
        assert all(methods[f"specdiff, {quality}"]["speedup"] > 0 for quality in QUALITIES)


@pytest.mark.parametrize("name", SMALL)
def test_the_loop_is_the_schedulers(name):
    sampler = toy(name)
    seen = []

    def model(hidden_states, timestep, **conditions):
        seen.append((len(hidden_states), timestep[0].item()))
        assert conditions == sampler.conditions
        return (torch.zeros_like(hidden_states),)

    assert torch.equal(sampler.run(model), sampler.noise)
    expected = (sampler.timesteps() / sampler.time_scale).tolist()
    batch = 2 if name.startswith("sd3") else 1
    assert seen == [(batch, pytest.approx(time)) for time in expected]


def test_large_geometries_have_the_published_sizes():
    """Weights of the models that these geometries are named after, in billions."""
    for name, billions in (("flux-dev", 11.9), ("sd3-medium", 2.0), ("sd35-large", 8.1)):
        sampler = build(name, torch.device("meta"), torch.bfloat16)
        count = sum(parameter.numel() for parameter in sampler.model.parameters())
        assert count / 1e9 == pytest.approx(billions, abs=0.06)
        assert sampler.geometry.tokens == 4096


@pytest.mark.slow
def test_programs_are_left_as_they_were():
    sampler = toy("flux-toy")
    bench = measure(sampler, RATES, [0.75], 1, EAGER, backend="eager")
    from specdiff.runtime.streams.registry import find_or_create

    for graph in find_or_create(bench.trials[1].compiled).graphs:
        assert not isinstance(graph.programs, TimedPrograms)


def test_peak_sees_an_allocation():
    device = torch.device("cpu")
    reset_peak(device)
    before = peak(device)
    if before is None:
        pytest.skip("no /proc here")
    torch.ones(1 << 24).sum()
    assert peak(device) >= before + (1 << 25)


def test_command_names_the_geometries():
    result = CliRunner().invoke(app, ["bench", "flux-pro"])
    assert isinstance(result.exception, SpecdiffError)
    assert "flux-dev, sd3-medium" in str(result.exception)


@pytest.mark.slow
def test_settings_of_inductor_are_for_every_method(monkeypatch):
    seen = []

    def compiled(sampler, backend, options):
        seen.append(dict(options))
        return really(sampler, backend, options if backend == "specdiff" else {})

    really = bench_measure.compiled
    monkeypatch.setattr(bench_measure, "compiled", compiled)
    given = {**EAGER, "epilogue-fusion": False, "mode": "reduce-overhead"}
    measure(toy("flux-toy"), RATES, [0.75], 1, given, backend="eager")
    settings = {"epilogue_fusion": False, "triton.cudagraphs": True}
    assert seen[0] == settings and settings.items() <= seen[1].items()


def test_command_refuses_what_the_ratios_take_the_place_of():
    result = CliRunner().invoke(app, ["bench", "flux-pro", "--option", "cache_ratio=0.5"])
    assert isinstance(result.exception, OptionError)
    assert str(result.exception).endswith("the ratios take its place, give --ratio")


@pytest.mark.slow
def test_the_ratios_fill_the_gaps_of_any_plan():
    plan = {"specdiff_plan": 1, "rule": {"every": 2}, "lookahead": 0}
    bench = measure(toy("flux-toy"), RATES, [0.75], 1, {**EAGER, "plan": plan}, backend="eager")
    calls = {program.name: program.calls for program in bench.trials[1].programs}
    # two dense of two before there are caches
    assert calls == {"dense": 3, "selective_4_measured": 2, "tail": 6} or calls["dense"] == 4


def test_command_names_the_modes():
    result = CliRunner().invoke(app, ["bench", "flux-toy", "--mode", "foo"])
    assert isinstance(result.exception, OptionError)
    assert "mode='foo': must be one of 'default'" in str(result.exception)


@pytest.mark.slow
def test_command_writes_figures(tmp_path):
    arguments = ["bench", "flux-toy", "--steps", "6", "--ratio", "0.75", "--repeats", "1"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "flux-toy.json").read_text())
    assert [method["cache_ratio"] for method in figures["methods"]] == [0.0, 0.75]
    assert (tmp_path / "flux-toy.md").read_text() in result.output


def test_depth_leaves_blocks_of_each_kind():
    flux, sd3 = (geometries.at_depth(GEOMETRIES[name], 0.1) for name in ("flux-dev", "sd3-medium"))
    assert (flux.blocks, flux.single_blocks) == (2, 4)
    assert (sd3.blocks, sd3.single_blocks) == (2, 0)
    assert flux.width == GEOMETRIES["flux-dev"].width
