"""Running, resuming and showing an evaluation, on a toy."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from specdiff import plan as plans
from specdiff.errors import SpecdiffError
from specdiff.evaluation.campaign import PHASES, RESULTS, Campaign
from specdiff.evaluation.candidates import all_candidates, choose, fewer_steps
from specdiff.evaluation.findings import (
    EACH,
    FEATURES,
    LOWEST,
    PSNR,
    SOLUTION,
    SPEEDUP,
    WORST,
    Finding,
    Findings,
    Terms,
    frontier,
)
from specdiff.evaluation.measuring import Setup
from specdiff.evaluation.method import DENSE, Candidate, Prepared
from specdiff.evaluation.plot import draw_frontier, frontier_figure
from specdiff.evaluation.table import markdown
from specdiff.settings import QUALITIES
from tests.evaluation.toy import dimmed, rival, toy_subject

TERMS = Terms("toy", 28, 2, 1, 0, 0, "wall")


def broken(pipeline: Any) -> None:
    raise RuntimeError("this model has\nno blocks")


def campaign(folder: Path, deadline: float | None = None, terms: Terms = TERMS) -> Campaign:
    subject = toy_subject()
    requests = subject.requests(max(terms.pictures, terms.large_set), 0)
    setup = Setup(subject, torch.device("cpu"), requests, terms.pictures, terms.pairs)
    return Campaign(setup, Findings.open(folder / RESULTS, terms, {}), folder, deadline)


def run(one: Campaign, candidates: Sequence[Candidate], *phases: str) -> int:
    with torch.no_grad():
        return sum(1 for _ in one.run(candidates, phases or PHASES))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    methods = [DENSE, fewer_steps()[0], rival("dimmed", dimmed), rival("broken", broken)]
    run(campaign(folder), methods)
    return folder


def test_every_measure_is_taken(finished: Path) -> None:
    methods = campaign(finished).findings.methods
    dense, shorter = methods["dense"].values, methods["7 steps"].values
    assert dense[PSNR] is None  # equal
    assert dense["latent_error"] == 0
    assert dense["flops_share"] == 1.0
    assert shorter["flops_share"] == 0.25
    assert 10 < shorter[PSNR] < 80
    assert 0 < shorter[FEATURES] < 1
    assert shorter[SOLUTION + WORST] < shorter[SOLUTION] < dense[SOLUTION]
    assert len(shorter["seconds_each"]) == len(shorter["dense_seconds_each"]) == 1
    assert shorter["graphs"] == 1


def test_a_peer_that_fails_leaves_its_reason_and_no_numbers(finished: Path) -> None:
    found = campaign(finished).findings.methods["broken"]
    assert found.reason == "RuntimeError: this model has no blocks"
    assert found.values == {}


def test_plans_of_one_name_are_methods_of_their_own(tmp_path: Path) -> None:
    files = [tmp_path / folder / "plan.json" for folder in "ab"]
    for file, dense in zip(files, ((0, 2), (0, 3)), strict=True):
        file.parent.mkdir()
        plans.Plan.of(4, dense).save(file)

    def settings() -> dict[str, Any]:
        found = all_candidates(toy_subject(), files)
        return {
            one.name: one.settings for one in found if isinstance(one.settings.get("plan"), str)
        }

    before = settings()
    assert list(before.values()) == [{"plan": str(file)} for file in files]
    assert all(name.startswith("specdiff, plan.json ") for name in before)
    assert settings() == before
    plans.Plan.of(4, (0, 1)).save(files[0])  # tuned again
    assert len(settings()) == 2 and len(set(settings()) - set(before)) == 1
    with pytest.raises(SpecdiffError, match=r"cannot read '.*missing.json'"):
        all_candidates(toy_subject(), [tmp_path / "missing.json"])


def test_qualities_are_methods() -> None:
    found = {one.name: one for one in all_candidates(toy_subject())}
    large = {name for name, one in found.items() if one.in_large_set}
    assert large == {"dense", *(f"specdiff, {quality}" for quality in QUALITIES)}
    assert all(found[f"specdiff, {q}"].settings == {"quality": q} for q in QUALITIES)


def test_a_failure_of_our_own_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no\sblocks"):
        run(campaign(tmp_path), [rival("ours", broken, is_peer=False)], "flops")


def test_what_is_known_is_not_measured_again(finished: Path) -> None:
    before = (finished / RESULTS).read_text()
    again = campaign(finished)
    assert run(again, [DENSE, rival("dimmed", broken)]) == 0
    assert (finished / RESULTS).read_text() == before
    assert run(again, [DENSE, rival("new", dimmed)], "draw") == 1


def test_a_refusal_is_tried_again_in_the_next_run(tmp_path: Path) -> None:
    first = campaign(tmp_path)
    run(first, [rival("moody", broken)], "draw", "flops")
    assert not first.left([rival("moody", broken)])  # until then it is settled
    again = campaign(tmp_path)
    assert again.findings.methods["moody"].reason
    run(again, [rival("moody", dimmed)], "draw", "flops")
    found = campaign(tmp_path).findings.methods["moody"]
    assert not found.reason and found.has("draw") and found.has("flops")


@pytest.mark.parametrize("phase", ["draw", "time", "flops"])
def test_our_own_failure_is_no_refusal_of_a_peer(tmp_path: Path, phase: str) -> None:
    one = campaign(tmp_path)
    one.setup.requests = []
    with pytest.raises(IndexError):
        run(one, [rival("dimmed", dimmed)], phase)


def test_past_the_deadline_nothing_begins(tmp_path: Path) -> None:
    late = campaign(tmp_path, deadline=time.monotonic() - 1)
    assert run(late, [DENSE]) == 0
    assert len(late.left([DENSE])) == len(PHASES)


def test_results_under_other_terms_are_refused(finished: Path) -> None:
    with pytest.raises(SpecdiffError, match="under other terms"):
        campaign(finished, terms=Terms("toy", 28, 3, 1, 0, 0, "wall"))


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"schema": 2, "plan": 1}', '{"schema": 1, "plan": 1}']
)
def test_a_file_that_holds_no_results_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / RESULTS).write_text(text)
    with pytest.raises(SpecdiffError, match=r"results.json holds .*choose another --out"):
        campaign(tmp_path)


@pytest.mark.slow
def test_phases_may_be_measured_one_by_one(finished: Path, tmp_path: Path) -> None:
    methods = [DENSE, rival("dimmed", dimmed), rival("broken", broken)]
    for phase in reversed(PHASES):  # comparing draws what is not drawn
        run(campaign(tmp_path), methods, phase)
    assert not campaign(tmp_path).left(methods[:2])
    piecewise, whole = (campaign(folder).findings.methods for folder in (tmp_path, finished))
    assert piecewise["dimmed"].values[PSNR] == whole["dimmed"].values[PSNR]
    assert piecewise["dimmed"].values.keys() == whole["dimmed"].values.keys()
    assert piecewise["broken"].reason == whole["broken"].reason


def test_one_phase_is_not_measured_on_two_devices(tmp_path: Path) -> None:
    one = campaign(tmp_path)
    run(one, [DENSE], "draw")
    elsewhere = campaign(tmp_path)
    elsewhere.findings.environment = {"device": "another"}
    run(elsewhere, [DENSE], "flops")
    with pytest.raises(SpecdiffError, match="'draw' began on None, this is another"):
        run(elsewhere, fewer_steps()[:1], "draw")
    assert json.loads((tmp_path / RESULTS).read_text())["environments"].keys() == {"draw", "flops"}


def test_results_without_the_dense_pictures_are_refused(finished: Path, tmp_path: Path) -> None:
    (tmp_path / RESULTS).write_text((finished / RESULTS).read_text())
    with pytest.raises(SpecdiffError, match="gone"):
        run(campaign(tmp_path), [rival("unknown", dimmed)], "compare")


def test_the_large_set_is_compared_as_a_set(tmp_path: Path) -> None:
    terms = Terms("toy", 28, 1, 1, 4, 0, "wall")
    one = campaign(tmp_path, terms=terms)
    run(one, [DENSE], "compare")
    assert one.findings.methods["dense"].values["kernel_distance"] is not None


@pytest.mark.parametrize("phase", ["draw", "time"])
def test_a_compilation_while_measuring_is_an_error(tmp_path: Path, phase: str) -> None:
    def recompile(pipeline: Any) -> None:
        inner, calls = pipeline.transformer, [0]

        def forward(x: torch.Tensor) -> Any:
            calls[0] += 1
            compiled(x if calls[0] < 30 else x.repeat(2, 1, 1, 1))  # not in the first picture
            return inner(x)

        compiled = torch.compile(inner, backend="eager", dynamic=False)
        pipeline.transformer = forward

    one = campaign(tmp_path)
    run(one, [DENSE, rival("restless", recompile)], phase)
    assert "compiled while measured" in one.findings.methods["restless"].reason


@pytest.mark.parametrize("phase", ["draw", "time"])
def test_more_graphs_than_promised_is_an_error(tmp_path: Path, phase: str) -> None:
    def prepare(pipeline: Any) -> Prepared:
        pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
        inner = torch.compile(torch.sin, backend="eager")
        outer = pipeline.transformer
        pipeline.transformer = lambda x: outer(x) + 0 * inner(x)
        return Prepared(pipeline, "graph")

    one = campaign(tmp_path)
    liar = Candidate("liar", "rivals", 28, {}, prepare, lambda pipeline: pipeline, is_peer=True)
    run(one, [DENSE, liar], phase)
    assert "2 graphs instead of one" in one.findings.methods["liar"].reason


def point(speedup: float, psnr: float | None) -> Finding:
    return Finding("f", 28, {}, values={SPEEDUP: speedup, PSNR: psnr, FEATURES: 0.1})


def test_the_frontier_holds_what_none_beats_in_both() -> None:
    points = {
        "slow": point(1.5, 40.0),
        "beaten": point(1.4, 39.0),
        "fast": point(3.0, 30.0),
        "equal": point(1.0, None),
        "dense": Finding("dense", 28, {}, values={SPEEDUP: 9.0, PSNR: 99.0, FEATURES: 0.0}),
        "odd": Finding("f", 28, {}, reason="does not run"),
    }
    found = frontier(Findings(TERMS, {}, points), PSNR, higher_is_better=True)
    assert found == ["fast", "slow"]


def test_a_family_has_one_colour_in_both_plots() -> None:
    points = {
        "equal": Finding("exact", 28, {}, values={SPEEDUP: 1.1, PSNR: None, FEATURES: 0.0}),
        "near": Finding("near", 28, {}, values={SPEEDUP: 2.0, PSNR: 40.0, FEATURES: 0.1}),
    }
    left, right = frontier_figure(Findings(TERMS, {}, points)).axes
    colours = [
        {line.get_label(): line.get_color() for line in axes.lines} for axes in (left, right)
    ]
    assert colours[0]["near"] == colours[1]["near"]


def test_the_plots_say_both_scales_and_the_worst_tenth() -> None:
    values = {SPEEDUP: 2.0, PSNR: 40.0, FEATURES: 0.1, SOLUTION: 37.0, SOLUTION + WORST: 35.0}
    found = Findings(TERMS, {}, {"near": Finding("near", 28, {}, values=values)})
    dense, solution, _ = frontier_figure(found).axes
    assert "dense run" in dense.get_ylabel() and "solution" in solution.get_ylabel()
    (line,) = solution.collections
    assert line.get_segments()[0].tolist() == [[2.0, 35.0], [2.0, 37.0]]
    assert not dense.collections


def test_table_and_plot_show_methods_and_reasons(finished: Path, tmp_path: Path) -> None:
    findings = campaign(finished).findings
    text = markdown(findings)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[0].startswith("| method | speedup | FLOPs | PSNR, dB")
    assert "recognised" not in rows[0]  # nothing fills it
    assert any("7 steps" in row and "25%" in row for row in rows)
    assert any(row.startswith("| dense") and "equal" in row for row in rows)
    assert "- broken: RuntimeError: this model has no blocks" in text
    draw_frontier(findings, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_says_the_worst_pictures() -> None:
    values = {PSNR: 40.0, PSNR + LOWEST: 30.0, PSNR + EACH: [30.0, *[40.0] * 9, 50.0]}
    found = Findings(TERMS, {}, {"near": Finding("near", 28, {}, values=values)})
    heading, _, row = markdown(found).splitlines()
    assert heading == "| method | PSNR, dB | 10th percentile | lowest |"
    assert row == "| near | 40.0 | 40.0 | 30.0 |"


def test_results_are_strict_json(finished: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads((finished / RESULTS).read_text(), parse_constant=refuse)


def test_methods_are_chosen_by_pattern() -> None:
    methods = all_candidates(toy_subject())
    assert len({one.name for one in methods}) == len(methods)
    assert {one.name for one in choose(methods, ["dense", "7 st*"])} == {"dense", "7 steps"}
    with pytest.raises(SpecdiffError, match="no method matches 'x'"):
        choose(methods, ["x"])


def test_what_is_no_faster_than_dense_does_not_set_the_scale() -> None:
    """Equal to it in all but rounding, it would press all others together."""
    values = {"no cache": (0.97, 140.0), "cache": (1.5, 40.0), "bold": (3.0, 30.0)}
    points = {
        name: Finding(name, 28, {}, values={SPEEDUP: speed, PSNR: db, FEATURES: 0.1})
        for name, (speed, db) in values.items()
    }
    assert frontier_figure(Findings(TERMS, {}, points)).axes[0].get_ylim() == (29.5, 40.5)
