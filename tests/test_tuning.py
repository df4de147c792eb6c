"""Tuning: the search on made-up scores, and on a model whose steps are known."""

import itertools
import math
import sys

import pytest
import torch
from PIL import Image

import specdiff
from specdiff.cli.main import main
from specdiff.errors import OptionError, SpecdiffError
from specdiff.measure.comparison import psnr
from specdiff.models import motion
from specdiff.models.demo import held_out_prompts
from specdiff.models.subject import MODELS, TUNING_SEED, emoji, find_subject
from specdiff.plan import Plan
from specdiff.tuning.places import Proposals, spaced
from specdiff.tuning.search import Search, Spent
from specdiff.tuning.tuner import Tuned, tune
from tests.runtime.toy import Euler, toy


def gaps(places, end):
    return [b - a for a, b in zip(places, (*places[1:], end), strict=True)]


def searched(score, target, evaluations=28, budget=10**6, guess=None):
    tried = []

    def counted(places):
        if sum(map(len, tried)) + len(places) > budget:
            raise Spent
        tried.append(places)
        return score(places)

    search = Search(evaluations, counted, target, guess)
    search.run()
    assert len(tried) == len(set(tried))
    return search, tried


def test_spaced_places():
    assert spaced(28, 28) == tuple(range(28))
    assert spaced(28, 1) == (0,) and spaced(28, 2) == (0, 27)
    for count in range(2, 29):
        places = spaced(28, count)
        assert len(set(places)) == count and (places[0], places[-1]) == (0, 27)
    found = spaced(28, 8)
    assert found[4] < 27 * 4 / 7 and found[1] >= 2


def test_the_search_finds_fewest_and_where():
    """Each place wants to be at a wish, and three are needed."""

    def score(places):
        wished = (0, 9, 11, 20)
        return -float(sum(min(abs(wish - place) for place in places) for wish in wished))

    search, _ = searched(score, target=0)
    assert search.best == (0, 9, 11, 20) and search.best_score == 0


def test_the_search_is_deterministic_and_polishes_what_it_found():
    def score(places):
        return -float(sum(gap**2 for gap in gaps(places, 28)))

    first, tried = searched(score, target=-130)
    again, tried_again = searched(score, target=-130)
    assert first.best == again.best and tried == tried_again
    # of so many places none is better, and one fewer cannot do
    found = gaps(first.best, 28)
    assert all(abs(a - b) <= 1 for a, b in itertools.pairwise(found))
    assert len(first.best) == 7


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_the_search_does_not_depend_on_the_unit_of_the_measure(unit):
    def score(places):
        return -float(sum(gap**2 for gap in gaps(places, 28)) + max(places) / 100)

    found, tried = searched(score, target=-130)
    other, tried_too = searched(lambda places: unit * score(places), target=-130 * unit)
    assert found.best == other.best and tried == tried_too


def test_nothing_reaches_the_target():
    search, _ = searched(lambda places: 0.0, target=1, evaluations=6)
    assert search.best == tuple(range(6)) and search.best_score == math.inf


def test_a_good_guess_saves_scores():
    """No worse places, and the number of those proposed after four scores: 10 would be halfway."""

    def score(places):
        return -float(sum(gap**2 for gap in gaps(places, 28)))

    blind, _ = searched(score, target=-130)
    search, tried = searched(score, target=-130, guess=lambda places: score(places) / 3 + 7)
    assert search.best_score >= blind.best_score and len(search.best) == len(blind.best) == 7
    assert [len(places) for places in tried[:4]] == [14, 7, 9, 8]


def test_proposals_by_a_guess():
    """The first three stay, whatever is guessed of them."""
    wished = (0, 5, 6, 9, 11)

    def guess(places):
        return -float(sum(min(abs(wish - place) for place in places) for wish in wished))

    found = Proposals(12, guess)
    assert found.of(7) == (0, 1, 2, 5, 6, 9, 11) and found.values[7] == 0
    assert found.of(5) == spaced(12, 5) and found.of(12) == tuple(range(12))
    assert set(found.values) == set(range(6, 13))
    assert Proposals(12, None).of(5) == spaced(12, 5) and not Proposals(12, None).values


@pytest.mark.parametrize("budget", [1, 30, 100])
def test_the_budget_ends_the_search(budget):
    search, tried = searched(lambda places: float(len(places)), target=5, budget=budget)
    assert sum(map(len, tried)) <= budget
    assert search.best == tuple(range(28)) or len(search.best) >= 5


def drawn(model, steps=12):
    def draw(index):
        return Euler(model, seed=index, steps=steps).run().latent / 8 + 0.5

    return draw


def test_a_model_is_tuned_without_touching_its_settings():
    model, lines = toy(cache_ratio=0.0), []
    tuned = tune(
        model, drawn(model), target=45, prompts=2, held_back=1, budget=2000,
        tell=lambda spent, line: lines.append((spent, line)), forecast="reuse",
    )  # fmt: skip
    assert tuned.score >= 45 and 2 <= len(tuned.plan.dense) < 12
    assert tuned.plan.settings == {"forecast": "reuse"}
    assert lines[-1][0] == tuned.spent <= 2000 + 12 + len(tuned.plan.dense)
    assert tuned.plan.notes["score"] == tuned.score and tuned.checked is not None
    reference = drawn(model)(0), drawn(model)(1)  # still dense
    with specdiff.session(model, plan=tuned.plan):
        found = [psnr(drawn(model)(i), reference[i]) for i in range(2)]
    assert sum(found) / 2 == pytest.approx(tuned.score)
    assert specdiff.stats(model).recompiles == 0


@pytest.mark.parametrize("target", [None, 30])
def test_a_model_is_tuned_to_the_solution(target):
    """As close to it as the dense run is, in fewer evaluations."""
    model = toy()
    tuned = tune(
        model, drawn(model), solve=drawn(model, steps=90), target=target, prompts=2, held_back=1,
        budget=600,
    )  # fmt: skip
    assert len(tuned.plan.dense) < 12 and tuned.score >= tuned.plan.notes["target"]
    assert tuned.closeness.to_solution.mean == tuned.checked
    if target is None:
        assert tuned.closeness.to_solution.mean > tuned.dense_to_solution.mean - 1
        assert tuned.closeness.to_dense.mean < tuned.score  # which has an error of its own
    with specdiff.session(model, plan=tuned.plan, target="solution"):
        found = drawn(model)(2)
    with specdiff.session(model, quality="dense"):
        assert psnr(found, drawn(model)(2)) == pytest.approx(tuned.closeness.to_dense.mean)
    said = {"to_dense", "to_solution", "dense_to_solution"}
    assert all(tuned.plan.notes[name].keys() == {"mean", "worst tenth"} for name in said)


def test_what_is_measured_is_what_is_saved():
    """Also where the model was compiled with another value of the setting."""
    model, fresh = toy(forecast="linear"), toy()
    tuned = tune(model, drawn(model), target=40, prompts=1, budget=150, forecast="reuse")
    with specdiff.session(fresh, cache_ratio=0.0):
        reference = drawn(fresh)(0)
    with specdiff.session(fresh, plan=tuned.plan):
        assert psnr(drawn(fresh)(0), reference) == pytest.approx(tuned.score)


@pytest.mark.parametrize(("prompts", "held_back"), [(2, 0), (1, 1)])
def test_pictures_of_different_lengths_are_refused_before_the_search(prompts, held_back):
    model, lines = toy(), []

    def draw(index):
        return drawn(model, steps=(12, 9)[index])(index)

    with pytest.raises(SpecdiffError, match="picture 2 takes 9 evaluations, those before 12"):
        tune(
            model, draw, target=40, prompts=prompts, held_back=held_back,
            tell=lambda spent, line: lines.append(line),
        )  # fmt: skip
    assert lines == ["dense picture 1"]


def in_two_calls(model):
    def draw(index):
        halves = [Euler(model, seed=2 * index + half, steps=8) for half in range(2)]
        for _ in range(8):
            for half in halves:
                half.step()
        return sum(half.latent for half in halves) / 16 + 0.5

    return draw


def after_a_fallback(model):
    def draw(index):
        run = Euler(model, seed=9, steps=8)
        model(run.latent * math.nan, run.time(), run.prompt)
        return drawn(model, steps=8)(index)

    return draw


@pytest.mark.parametrize(("drawing", "dense"), [(in_two_calls, 16), (after_a_fallback, 9)])
@pytest.mark.parametrize("budget", [60, 10**4])
def test_the_budget_counts_every_evaluation(drawing, dense, budget):
    model = toy()
    tuned = tune(model, drawing(model), target=45, prompts=2, budget=budget)
    assert tuned.spent == len(model.runtime.programs.calls) <= budget
    assert tuned.spent >= 2 * dense and len(tuned.plan.ratios) == 8


def test_a_tuned_plan_goes_through_a_file(tmp_path):
    model = toy()
    tuned = tune(model, drawn(model), target=30, prompts=1, budget=200)
    tuned.plan.save(str(tmp_path / "plan.json"))
    specdiff.configure(model, plan=tmp_path / "plan.json")
    before = specdiff.stats(model).dense
    drawn(model)(0)
    assert specdiff.stats(model).dense == before + len(tuned.plan.dense)
    assert Plan.load(tmp_path / "plan.json") == tuned.plan


def test_what_cannot_be_tuned_says_why():
    from tests.runtime.toy import ToyPrograms

    model = toy(programs=ToyPrograms(time=False))
    with pytest.raises(SpecdiffError, match="nothing to tune: no time input"):
        tune(model, drawn(model), target=40)
    model = toy()
    with pytest.raises(SpecdiffError, match="the model did not run"):
        tune(model, lambda index: torch.zeros(3), target=40)
    with pytest.raises(SpecdiffError, match="nothing to tune: a picture takes one evaluation"):
        tune(model, drawn(model, steps=1), target=40)
    with pytest.raises(OptionError, match=r"settings.plan: no such option"):
        tune(model, drawn(model), target=40, plan="plan.json")
    with pytest.raises(OptionError, match="cache_ratio: gaps are skipped while a plan is tuned"):
        tune(model, drawn(model), target=40, prompts=1, cache_ratio=0.5)


def test_what_nothing_reaches_is_said_in_strict_json(tmp_path):
    model = toy()
    tuned = tune(model, drawn(model), target=999, prompts=1, held_back=1, budget=100)
    assert len(tuned.plan.dense) == 12 and tuned.score == math.inf and tuned.checked is None
    assert tuned.plan.notes["score"] is None
    tuned.plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").notes["score_held_back"] is None


@pytest.mark.parametrize("value", [math.inf, {1}])
def test_what_json_does_not_have_is_not_saved(value, tmp_path):
    plan = Plan((0.0, 1.0), notes={"score": value})
    with pytest.raises(OptionError, match=r"plan: notes=.*: must be JSON"):
        plan.save(tmp_path / "plan.json")
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize("target", [math.nan, math.inf])
def test_a_target_is_a_number(target):
    model = toy()
    with pytest.raises(OptionError, match=r"target=.*: must be a finite number"):
        tune(model, drawn(model), target=target)
    with pytest.raises(OptionError, match="target=None: must be a finite number"):
        tune(model, drawn(model))


def test_a_budget_below_the_dense_pictures_is_refused():
    model = toy()
    with pytest.raises(SpecdiffError, match="budget=30: must be at least 36, for 3 dense pictures"):
        tune(model, drawn(model), target=40, budget=30)
    assert len(model.runtime.programs.calls) == 12  # after the first


@pytest.mark.parametrize("model", MODELS)
def test_pictures_to_tune_on_are_not_measured_on(model, tmp_path):
    weights = tmp_path / "never loaded"
    weights.touch()
    Image.new("RGB", (16 * motion.SIDE, motion.SIDE)).save(tmp_path / motion.FIRST_FRAMES)
    subject = find_subject(model, weights, torch.device("cpu"))
    tuned_on, measured = subject.tuning_requests(24), subject.requests(256, 100)
    shared = {r.prompt for r in tuned_on} & {r.prompt for r in measured}
    assert shared == (set() if model == "emoji" else set(subject.prompts))
    assert not {r.seed for r in tuned_on} & {r.seed for r in measured}
    assert tuned_on[0].seed == TUNING_SEED


def test_what_is_measured_is_what_the_readme_says():
    prompts = [r.prompt for r in emoji(torch.device("cpu")).requests(32, 100)]
    assert (len(set(prompts)), len(set(prompts) & set(held_out_prompts()))) == (16, 8)


def ran(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["specdiff", "tune", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return end.code
    return 0


def test_the_command_saves_a_plan(monkeypatch, tmp_path, capsys):
    seen = []

    def pretend(wanted, console):
        seen.append(wanted)
        return Tuned(Plan.of(4, (0, 3), **wanted.options), 41.0, None, 1.9, 77)

    monkeypatch.setattr("specdiff.evaluation.tuning.tune_subject", pretend)
    out = tmp_path / "plans" / "plan.json"
    given = ("--target", 41, "--budget", 80, "--option", "forecast=reuse", "--out", out)
    assert ran(monkeypatch, *given) == 0
    assert (seen[0].target, seen[0].budget, seen[0].options) == (41, 80, {"forecast": "reuse"})
    assert Plan.load(out).dense == (0, 3)
    assert "dense: (0, 3), 2 skipped" in capsys.readouterr().out


def test_the_command_names_a_wrong_measure(monkeypatch, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert ran(monkeypatch, "--measure", "ssim", "--out", out) == 2
    assert "no measure 'ssim': choose from psnr, features" in capsys.readouterr().err
    assert not out.exists()
