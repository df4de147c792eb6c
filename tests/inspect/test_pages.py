"""Pages and records of reports and runs: complete, self-contained, and with the right figures."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil

import pytest
import torch
from PIL import Image
from rich.console import Console

import specdiff
from specdiff.inspect.page import pretty_formula, report_page
from specdiff.inspect.plain import to_json
from specdiff.inspect.report import Report
from specdiff.inspect.runs import comparison_page, recording_page
from specdiff.inspect.steps import VEILS, share_computed, veil
from specdiff.inspect.terminal import render
from specdiff.measure.machine import MachineRates
from specdiff.plan import Plan
from specdiff.runtime.records.recording import (
    COMPUTED,
    FORECAST,
    REUSED,
    Clock,
    Recording,
    StepRecord,
)
from tests.measure.standins import REQUESTS, SIDE, noise_picture, stand_ins
from tests.models import ZOO, flux

RATES = MachineRates(flops_per_second=1e9, bytes_per_second=1e12)
OPTIONS = {"method": "paper", "plan": Plan.warmup(2), "cache_ratio": 0.5}


@pytest.fixture(scope="module")
def report() -> Report:
    model, inputs = flux(2, 1)
    return specdiff.explain(model, **inputs, options=OPTIONS)


def assert_self_contained(page: str) -> None:
    """No script, style, picture or font from elsewhere; namespaces are names, not places."""
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert not re.search(r"url\((?!data:|#)", page)
    assert "@import" not in page and "<link" not in page


def step(kind: str, active=None, reused=None, tokens: int = 16, index: int = 0) -> StepRecord:
    clock = Clock(torch.device("cpu"))
    clock.stop()
    return StepRecord(
        clock, batch=1, tokens=tokens, kind=kind, reason="warm-up", generation=0, index=index,
        time=1.0 - index / 4, active=active, reused=reused,
        scores=None if active is None else torch.zeros(1, tokens),
    )  # fmt: skip


def steps(tokens: int = 16) -> list[StepRecord]:
    active = torch.tensor([[0, 5]])
    reused = torch.zeros(1, tokens, dtype=torch.bool)
    reused[0, 7] = True
    found = [step("dense", tokens=tokens), step("selective", active, reused, tokens, 1)]
    return [*found, step("skipped", tokens=tokens, index=2)]


# explain ----------------------------------------------------------------------------------------


def test_page_says_what_was_found(report):
    page = report_page(report, RATES, 8, "a model <of ours>")
    assert_self_contained(page)
    assert "a model &lt;of ours&gt;" in page
    for words in ("hidden_states", "encoder_hidden_states", "transformer_blocks.1", "modulation"):
        assert words in page
    drawn = shutil.which("dot") is not None
    assert page.count("<svg") == 2 * drawn
    assert "Nothing: every operation" in page  # left whole


def test_page_of_a_model_that_runs_dense_says_why():
    page = report_page(Report(False, "no <attention>"), RATES)
    assert "no &lt;attention&gt;" in page and "What a step costs" not in page
    assert "as it is" in page
    page = report_page(Report(False, "no attention", no_step_plan=""), RATES)
    assert "Whole steps of this model can be forecast" in page and "as it is" not in page


def test_record_is_strict_json_and_its_formulas_are_those_of_the_report(report):
    found = json.loads(json.dumps(to_json(report, RATES, 8), allow_nan=False))
    assert found["sizes"] == {"B": 2, "N": 42, "T": 4}
    assert len(found["regions"]) == len(report.regions)
    total = sum(region["dense"]["flops"] for region in found["regions"])
    assert total == found["cost"]["dense"]["flops"] == report.step_flops()
    formula = found["cost"]["selective"]["formulas"]["flops"]
    half = found["cost"]["selective"]["at"][0]
    assert half["active"] == 21
    value = eval(formula, {"B": 2, "N": 42, "T": 4, "K": 21})
    assert value == half["flops"] == report.step_flops(21)
    speedup = eval(found["cost"]["speedup"], {"B": 2, "N": 42, "T": 4, "K": 21})
    assert speedup == pytest.approx(half["speedup"])
    kinds = [one["kind"] for one in found["schedule"]]
    assert kinds == ["dense"] * 2 + ["selective"] * 6
    refused = to_json(Report(False, "no attention", "no time"))
    reasons = {"reason": "no attention", "no_step_plan": "no time"}
    assert refused == {"schema": 1, "selective": False, **reasons, "kept_bytes": 0}


def test_prediction_is_bound_by_the_slower_of_work_and_traffic(report):
    slow = MachineRates(flops_per_second=1e9, bytes_per_second=1e30)
    found = report.predict(slow, 8)
    assert found.dense == pytest.approx(report.step_flops() / 1e9)
    assert found.selective == pytest.approx(report.step_flops(21) / 1e9)
    # two steps of warm-up, one look ahead, six selective ones
    assert found.run == pytest.approx(3 * found.dense + 6 * found.selective)
    assert found.speedup == pytest.approx(8 * found.dense / found.run)
    traffic = report.predict(MachineRates(1e30, 1e9), 8)
    moved = report.sizes.evaluate(report.dense_work.moved)
    assert traffic.dense == pytest.approx(moved / 1e9)


def test_prediction_of_a_schedule_that_skips_whole_steps():
    model, inputs = flux(1, 0)
    found = specdiff.explain(model, **inputs).predict(RATES, 12)
    assert found.selective is None
    assert found.dense > 100 * found.skipped > 0
    assert found.run == pytest.approx(9 * found.dense + 3 * found.skipped)


def test_terminal_shows_the_same(report):
    console = Console(width=120)
    with console.capture() as captured:
        console.print(render(report, RATES, 8))
        console.print(render(Report(False, "no attention")))
    printed = captured.get()
    for words in ("encoder_hidden_states", "attention+mlp", "FLOPs selective", "██▄▄▄▄▄▄"):
        assert words in printed
    assert "token selection: no, because no attention" in printed


def test_ops_left_whole_come_with_the_reason():
    case = ZOO["helios_transformer"]()
    found = specdiff.explain(case.model, **case.inputs)
    (overlapping,) = [op for op in found.whole if op.op == "cat"]
    assert (overlapping.count, overlapping.where) == (2, "blocks.0")
    assert "overlap" in overlapping.why
    assert overlapping.why in report_page(found) and overlapping.why in str(found)


def test_formulas_are_written_as_on_paper(report):
    text = pretty_formula(report.dense_work.flops)
    assert "N²" in text and "*" not in text


def test_explain_refuses_unknown_options():
    model, inputs = flux(1, 0)
    with pytest.raises(specdiff.OptionError, match="cache_ratio"):
        specdiff.explain(model, **inputs, options={"cache_ration": 1})


# Recorded runs ----------------------------------------------------------------------------------


def test_veils_have_the_colour_of_each_class():
    _, selective, skipped = steps()
    found = veil(selective, 32, 32)
    assert found.shape == (4, 4, 4)
    expected = {(0, 0): COMPUTED, (1, 1): COMPUTED, (1, 3): REUSED, (3, 3): FORECAST}
    for (row, column), kind in expected.items():
        assert tuple(found[row, column].tolist()) == VEILS[kind]
    assert (veil(skipped, 64, 16)[..., 3] > 0).all()


def test_share_counts_looking_ahead():
    some = steps()
    assert share_computed(some) == pytest.approx((1 + 2 / 16) / 3)
    some[0].speculative = 1
    assert share_computed(some) == pytest.approx((2 + 2 / 16) / 3)


def test_page_of_a_run_has_a_picture_for_every_step():
    page = recording_page(Recording([], steps()), noise_picture(REQUESTS[0]))
    assert_self_contained(page)
    veils = re.findall(r'class="veil" src="data:image/png;base64,([^"]+)"', page)
    assert len(veils) == 3 + 1  # and the one that plays
    shown = Image.open(io.BytesIO(base64.b64decode(veils[2])))
    assert shown.size == (4, 4) and shown.getpixel((3, 1)) == VEILS[REUSED]
    assert page.count("background-image") == 1
    assert "Step 2 of 3: selective. 12 % of the tokens computed" in page


@pytest.mark.parametrize("image", [None, torch.rand(SIDE, SIDE, 3)], ids=["none", "unfit"])
def test_page_of_a_run_without_a_fitting_picture_keeps_its_timeline(image):
    page = recording_page(Recording([], steps(tokens=17)), image)
    assert 'class="timeline"' in page and "data:image/png" not in page.split("<body>")[1]


def test_an_empty_recording_is_refused():
    with pytest.raises(ValueError, match="nothing was recorded"):
        recording_page(Recording([]))


# The demo's comparison --------------------------------------------------------------------------


def test_page_of_a_comparison_answers_the_four_questions(report):
    comparison = specdiff_comparison()
    runs = {"specdiff": [steps(), steps()]}
    page = comparison_page(comparison, report, runs, RATES, ["a busy machine"])
    assert_self_contained(page)
    order = [
        page.index(f">{question}</h2>")
        for question in (
            "What was found", "What was skipped", "How much it saved", "What it cost in quality",
        )
    ]  # fmt: skip
    assert order == sorted(order)
    for request in REQUESTS:
        assert request.prompt in page
    ours = comparison.trials[1]
    assert f"{comparison.speedup(ours):.2f}×" in page
    assert f"{ours.psnr:.1f} dB" in page and "a busy machine" in page
    assert page.count('class="viewer"') == 2
    pictures = re.findall(r'<img src="data:image/png', page)
    assert len(pictures) == len(REQUESTS) * (2 * len(comparison.trials) - 1)
    assert "The rival to beat" in page and "with 2 it is" in page


def specdiff_comparison():
    from specdiff.measure.comparison import compare

    return compare(stand_ins(), REQUESTS, repeats=1)
