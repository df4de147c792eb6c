"""Plans as data: read, refused with the field's name, scaled, and followed by the runtime."""

import json
import math
from itertools import pairwise

import pytest
import torch

import specdiff as sd
from specdiff.errors import OptionError
from specdiff.options import Options, check_overrides
from specdiff.plan import Plan
from specdiff.rule import Rule
from specdiff.runtime.sampler.timeline import evaluations_planned, next_time, uneven_so_far
from specdiff.runtime.tokens.schedule import Place, Schedule
from specdiff.settings import METHODS, QUALITIES, SOLUTION_PLANS
from tests.runtime.toy import UNCORRECTED, Euler, sigmas, toy

HAND = {"specdiff_plan": 1, "evaluations": ["dense", "skip", 0.5, "dense", "skip", "dense"]}
DENSE = (0, 2, 4, 7, 10, 14, 18, 22, 26, 27)


def followed(plan, total, tokens=16, **options):
    schedule = Schedule.of(Options(plan=plan, **options).resolve(), (tokens,))
    return [schedule.decide(Place.known(i, total))[0] for i in range(total)]


def dense_of(counts):
    return [index for index, count in enumerate(counts) if count]


def test_a_file_is_what_it_was_saved_as(tmp_path):
    plan = Plan((0.0, 1.0, 0.9, 0.0), {"forecast": "reuse"}, {"psnr_db": 40.0})
    plan.save(tmp_path / "plan.json")
    found = Plan.load(tmp_path / "plan.json")
    assert (found, found.notes) == (plan, plan.notes)
    stored = json.loads((tmp_path / "plan.json").read_text())
    assert stored["evaluations"] == ["dense", "skip", 0.9, "dense"]
    assert Options(plan=str(tmp_path / "plan.json")).plan == plan == Options(plan=stored).plan


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"specdiff_plan": 2}, "specdiff_plan=2: must be 1"),
        ({"evaluation": []}, "evaluation: no such field; fields: specdiff_plan, evaluations"),
        ({"evaluations": ["dense"]}, "evaluations: must be a list of at least 2"),
        ({"evaluations": {}}, "evaluations: must be a list"),
        ({"evaluations": ["dense", "dens"]}, r"evaluations\[1\]='dens': must be 'dense', 'skip'"),
        ({"evaluations": ["dense", 1.5]}, r"evaluations\[1\]=1.5: must be"),
        ({"evaluations": ["dense", True]}, r"evaluations\[1\]=True: must be"),
        ({"evaluations": ["skip", "dense"]}, r"evaluations\[0\]='skip': must be 'dense'"),
        ({"settings": []}, r"settings=\[\]: must be an object"),
        ({"settings": {"forecast": "cubic"}}, "settings.forecast='cubic': must be one of"),
        ({"settings": {"forecasts": "reuse"}}, "settings.forecasts: no such option.*'forecast'"),
        ({"settings": {"cache_ratio": 2}}, "settings.cache_ratio=2: must be a number from 0 to 1"),
        ({"settings": {"quality": "fast"}}, "settings.quality: no such option"),
        ({"rule": {"every": 2}}, "must have evaluations or a rule, one of them"),
        ({"lookahead": -1}, "lookahead=-1: must be an integer of at least 0"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, change, said):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({**HAND, **change}))
    with pytest.raises(OptionError, match=said):
        Options(plan=file)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Plan((1.0, 0.0, 1.0)), r"plan: ratios\[0\]=1.0: must be 'dense'"),
        (lambda: Plan((1.0, 1.0)), r"plan: ratios\[0\]=1.0: must be 'dense'"),
        (lambda: Plan(()), "plan: ratios: must be a list of at least 2"),
        (lambda: Plan("dense"), "plan: ratios: must be a list of at least 2"),
        (lambda: Plan((0.0, math.nan)), r"plan: ratios\[1\]=nan: must be"),
        (lambda: Plan((0.0, 2)), r"plan: ratios\[1\]=2: must be .* a cache ratio from 0 to 1"),
        (lambda: Plan((0.0, 1.0), [1]), r"plan: settings=\[1\]: must be an object"),
        (lambda: Plan((0.0, 1.0), {}, "good"), "plan: notes='good': must be an object"),
        (lambda: Plan((0.0, 1.0), rule=Rule()), "plan: give ratios or a rule, not both"),
        (lambda: Plan((0.0, 1.0), lookahead=1.0), "plan: lookahead=1.0: must be an integer"),
        (lambda: Plan.tapered(0), "plan: tapered=0: must be an integer of at least 1"),
        (lambda: Plan.every(2.0), "plan: every=2.0: must be an integer"),
        (lambda: Plan.every(0), r"plan: every=0: must be .*; write Plan.warmup\(1\)"),
        (lambda: Plan.warmup(0), "plan: warmup=0: must be an integer of at least 1"),
        (lambda: Plan.of(10, (1, 2)), r"plan: ratios\[0\]=1.0: must be 'dense'"),
        (lambda: Plan.of(10, (0, 10)), "plan: dense=10: must be from 0 to 9"),
        (lambda: Plan.of(10, (0, -1)), "plan: dense=-1: must be from 0 to 9"),
    ],
)
def test_a_wrong_field_of_a_plan_in_code_is_named(make, said):
    with pytest.raises(OptionError, match=said):
        make()


def test_a_plan_in_code_is_what_a_file_would_give(tmp_path):
    plan = Plan([0, 1, 0.5])
    plan.save(str(tmp_path / "plan.json"))
    assert plan == Plan((0.0, 1.0, 0.5)) == Plan.load(str(tmp_path / "plan.json"))
    assert hash(plan) == hash(Plan((0.0, 1.0, 0.5)))


def test_a_fallback_of_a_plan_that_selects_compiles_no_other_program():
    model = toy(plan={**HAND, "lookahead": 0})
    run = Euler(model, steps=6).run(3)
    programs = model.runtime.programs
    before = set(programs.names())
    programs.calls.clear()
    model(run.latent * math.nan, run.time(), run.prompt)
    assert sd.stats(model).fallbacks == {"latent is not finite": 1}
    assert programs.names() == ["scratch"] and "scratch" in before


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(OptionError, match=r"cannot read '.*missing.json'"):
        sd.configure(toy(), plan=tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(OptionError, match=r"broken.json: not JSON"):
        sd.session(toy(), plan=tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(OptionError, match=r"list.json: must be an object"):
        Options(plan=tmp_path / "list.json")
    with pytest.raises(OptionError, match=r"plan=3: must be a Plan, a file"):
        Options(plan=3)


def test_a_plan_and_a_quality_exclude_each_other():
    with pytest.raises(OptionError, match="quality: the plan takes its place"):
        Options(plan=HAND, quality="fast")
    # given later, either replaces the other, and what was to fill its gaps
    planned, plain = Options(plan=HAND, cache_ratio=0.5), Options(quality="fast")
    assert planned.override(check_overrides({"quality": "fast"})) == plain
    assert plain.override(check_overrides({"plan": HAND, "cache_ratio": 0.5})) == planned
    # a ratio fills the gaps of whatever plan there is
    assert planned.override(check_overrides({"cache_ratio": 0.25})) == Options(
        plan=HAND, cache_ratio=0.25
    )


def test_settings_of_a_plan_yield_to_what_is_given():
    held = {"forecast": "reuse", "method": "paper", "text_steps": "dense", "cache_ratio": 0.75}
    plan = {**HAND, "settings": held}
    found = Options(plan=plan, forecast="linear").resolve()
    assert (found.forecast, found.method, found.text_steps) == ("linear", "paper", "dense")
    assert (found.starvation, found.cache_ratio) == (METHODS["paper"]["starvation"], 0.75)
    assert Options(plan=plan, method="history").resolve().starvation == 0
    assert Options(plan=plan, cache_ratio=1).resolve().cache_ratio == 1


def test_the_paper_is_a_plan_and_its_constants():
    found = Options(method="paper").resolve()
    assert found.plan.rule == Rule(warmup=3) and found.plan.lookahead == 2
    assert (found.cache_ratio, found.forecast, found.text_steps) == (0.9, "mean", "all")
    assert (found.reuse_share, found.starvation, found.correction) == (0.1, 3.0, False)
    assert found.selective_importance  # measured in every step
    # its ratio is that of its own plan
    assert Options(method="paper", plan=Plan.every(3)).resolve().cache_ratio == 1


# What the options warmup_steps, refresh_interval and tapered decided before there were rules, at
# 1,024 tokens: D dense, . in a gap; where the number of evaluations is read off the times the end
# of ten is known too late.
DECIDED = {
    (Plan.tapered(4), 10, True): "D.D.D..DDD",
    (Plan.tapered(4), 10, False): "D.D.D..D.D",
    (Plan.tapered(4), 28, False): "D.D.D..D..D...D...D...D...DD",
    (Plan.tapered(4), 40, False): "D.D.D..D..D...D...D...D...D...D...D...DD",
    (Plan.tapered(3), 28, False): "D.D.D.D..D..D..D..D..D..D.DD",
    (Plan.tapered(8), 28, False): "D.D..D...D.....D.......D..DD",
    (Plan.tapered(8), 40, True): "D.D..D...D.....D.......D.......D......DD",
    (Plan.tapered(4, warmup=3), 28, False): "DDD.D..D..D...D...D...D...DD",
    (Plan.every(4), 28, False): "D...D...D...D...D...D...D...",
    (Plan.every(4, warmup=3), 28, False): "DDD...D...D...D...D...D...D.",
    (Plan.every(1), 10, False): "DDDDDDDDDD",
    (Plan.warmup(3), 28, False): "DDD.........................",
}


@pytest.mark.parametrize(("ratio", "active"), [(0.75, 256), (0.9, 104), (1.0, 0)])
@pytest.mark.parametrize(("plan", "steps", "known"), DECIDED)
def test_rules_decide_what_the_options_of_old_decided(plan, steps, known, ratio, active):
    schedule = Schedule.of(Options(plan=plan, cache_ratio=ratio).resolve(), (1024,))
    times = sigmas(steps)[:-1]
    places = [
        Place.known(i, steps) if known else Place.of(times[: i + 1], None, schedule.usual)
        for i in range(steps)
    ]
    counts = [schedule.decide(place)[0] for place in places]
    expected = [1024 if each == "D" else active for each in DECIDED[plan, steps, known]]
    assert counts == expected
    gaps = "." in DECIDED[plan, steps, known]
    assert schedule.selects == (gaps and active > 0) and schedule.forecasts == gaps


@pytest.mark.parametrize(
    ("plan", "rule"),
    [
        (Plan.tapered(), {"tapered": 4}),
        (Plan.tapered(8, warmup=2), {"tapered": 8, "warmup": 2}),
        (Plan.every(3, warmup=3), {"every": 3, "warmup": 3}),
        (Plan.warmup(3), {"warmup": 3}),
        (Plan.warmup(1), {"warmup": 1}),
    ],
)
def test_a_rule_is_written_as_a_rule(tmp_path, plan, rule):
    assert plan.to_json() == {"specdiff_plan": 1, "rule": rule}
    held = Plan((), {"cache_ratio": 0.9}, {"from": "hand"}, plan.rule, lookahead=0)
    held.save(tmp_path / "plan.json")
    found = Plan.load(tmp_path / "plan.json")
    assert (found, found.notes) == (held, held.notes)
    stored = json.loads((tmp_path / "plan.json").read_text())
    assert stored == held.to_json() and stored["lookahead"] == 0
    assert Options(plan=stored).resolve().cache_ratio == 0.9


@pytest.mark.parametrize(
    "rule", [{}, [], "tapered", {"taper": 4}, {"tapered": 4, "every": 4}, {"warmup": 0}]
)
def test_a_wrong_rule_is_named(rule):
    with pytest.raises(OptionError, match=r"plan: rule"):
        Plan.load({"specdiff_plan": 1, "rule": rule})


def test_the_ratio_fills_the_gaps_of_a_list():
    assert followed(HAND, 6, cache_ratio=0.75) == [16, 4, 8, 16, 4, 16]
    assert followed(HAND, 12, cache_ratio=0.75) == [16, 4, 4, 4, 8, 4, 16, 4, 4, 4, 16, 4]
    assert followed(HAND, 6, cache_ratio=0) == [16, 16, 8, 16, 16, 16]
    assert followed(QUALITIES["fast"], 28, cache_ratio=0.5).count(8) == 19


def test_a_run_of_the_same_length_follows_it_to_the_letter():
    assert followed(HAND, 6) == [16, 0, 8, 16, 0, 16]
    assert dense_of(followed(Plan.of(28, DENSE), 28)) == list(DENSE)


@pytest.mark.parametrize("total", [2, 5, 10, 14, 20, 27, 29, 40, 50, 100])
def test_a_run_of_another_length_has_its_dense_evaluations_at_the_same_places(total):
    found = dense_of(followed(Plan.of(28, DENSE), total))
    places = {min(math.ceil(i * total / 28 - 0.5 + 1e-9), total - 1) for i in DENSE}
    assert set(found) == places and 0 in places
    assert len(found) == len(places) <= 10


def test_where_entries_meet_the_one_that_computes_most_counts():
    plan = {"specdiff_plan": 1, "evaluations": ["dense", "skip", 0.75, 0.5, "skip", "skip"]}
    assert followed(plan, 3) == [16, 4, 8]
    assert followed(plan, 12) == [16, 0, 0, 0, 4, 0, 8, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("steps", [14, 28, 50])
@pytest.mark.parametrize("rising", [False, True])
@pytest.mark.parametrize("unit", [1, 1000])
def test_the_length_of_a_run_is_read_off_its_times(steps, rising, unit):
    times = [unit * (1 - s if rising else s) for s in sigmas(steps)[:-1]]
    for index in range(steps):
        seen = times[: index + 1]
        found = evaluations_planned(seen, None, 28)
        if index < 2:  # two times tell no more than that there are at most so many
            assert min(steps, 28) <= found <= 28
        else:
            assert found == pytest.approx(steps, rel=1e-3)
        assert evaluations_planned(seen, times, 28) == pytest.approx(steps, rel=1e-3)


@pytest.mark.parametrize("shift", [1, 3, 6])
@pytest.mark.parametrize("steps", [14, 50])
def test_rounded_times_are_waited_for(steps, shift):
    uniform = torch.linspace(1, 0, steps + 1)[:-1]
    times = (shift * uniform / (1 + (shift - 1) * uniform)).to(torch.bfloat16).tolist()
    found = [evaluations_planned(times[: index + 1], None, 28) for index in range(steps)]
    assert found[0] == 28 and all(abs(total - steps) < 1 for total in found[-steps // 4 :])
    assert all(0.7 * min(steps, 28) < total < max(28.1, 1.3 * steps) for total in found)
    assert evaluations_planned([1.0] * 9, None, 28) == 28


def test_a_last_evaluation_that_is_hardly_a_step_has_the_last_entry_too():
    """As Stable Diffusion 3 has it: the plan's last entry goes to the last but one as well."""
    uniform = torch.linspace(1, 0.003, 28, dtype=torch.float64)
    times = (3 * uniform / (1 + 2 * uniform)).tolist()
    schedule = Schedule.of(Options(plan=Plan.of(28, (0, 14, 27))).resolve(), (16,))
    for given in (times, None):
        places = [Place.of(times[: i + 1], given, 28) for i in range(28)]
        assert places[9].total == pytest.approx(27.08, abs=0.01)
        assert dense_of(schedule.decide(place)[0] for place in places) == [0, 14, 26, 27]


@pytest.mark.parametrize("session", [True, False])
@pytest.mark.parametrize("steps", [14, 28, 50])
def test_the_runtime_follows_a_plan(session, steps):
    model = toy(plan=Plan.of(28, DENSE), **UNCORRECTED)
    run = Euler(model, steps=steps)
    with sd.session(model, timesteps=run.sigmas[:-1] if session else None):
        run.run()
    exact = [index for index, error in enumerate(run.errors) if error < 1e-6]
    expected = set(dense_of(followed(Plan.of(28, DENSE), steps)))
    # without the times, the first two evaluations are taken for those of a run of 28
    later = {i for i in exact if session or i > 3}
    # a place halfway between two evaluations may go to either
    assert all({i - 1, i, i + 1} & expected for i in later)
    assert abs(len(exact) - len(expected)) <= 2 * (not session)
    assert sd.stats(model).dense == len(exact)


def test_a_plan_mixes_dense_selective_and_skipped_without_recompiling():
    evaluations = ["dense", "skip", "dense", 0.5, "skip", 0.75, "dense"]
    plan = {**HAND, "evaluations": evaluations, "lookahead": 0}
    model = toy(cache_ratio=0.0)
    sd.configure(model, plan=plan)
    Euler(model, steps=7).run()
    counts = sd.stats(model)
    assert (counts.dense, counts.selective, counts.skipped) == (3, 2, 2)
    assert counts.tokens_computed == 3 * 16 + 8 + 4
    with sd.session(model, quality="dense"):
        Euler(model, steps=7).run()
    assert sd.stats(model).dense == 10
    sd.configure(model, plan=None, cache_ratio=0.0)
    Euler(model, steps=7).run()
    assert sd.stats(model).dense == 17 and sd.stats(model).recompiles == 0


def test_qualities_are_plans():
    names = ("closest", "near-lossless", "balanced", "fast")
    assert set(QUALITIES) == set(names)
    dense = [len(QUALITIES[name].dense) for name in names]
    assert dense == sorted(dense, reverse=True)
    assert Options(quality="balanced").resolve() == Options().resolve()
    assert Options().resolve().plan == QUALITIES["balanced"]
    assert Options(method="paper", quality="fast").resolve().plan == QUALITIES["fast"]
    assert Options(quality="fast", forecast="reuse").resolve().plan == QUALITIES["fast"]
    assert Options(quality="fast", cache_ratio=0.9).resolve().plan == QUALITIES["fast"]
    with pytest.raises(OptionError, match="quality='best': must be one of 'dense', 'closest'"):
        Options(quality="best")


def test_the_solution_has_plans_of_its_own():
    """None is taken where a plan is given, or the method has one."""
    for quality, plan in SOLUTION_PLANS.items():
        assert Options(quality=quality, target="solution").resolve().plan == plan
    assert set(SOLUTION_PLANS) == set(QUALITIES)
    assert Options(target="solution").resolve().plan == SOLUTION_PLANS["balanced"]
    assert Options(target="solution", plan=Plan.every(2)).resolve().plan == Plan.every(2)
    assert Options(target="solution", quality="dense").resolve().plan == Plan.every(1)
    paper = Options(target="solution", method="paper").resolve().plan
    assert paper == Options(method="paper").resolve().plan


def test_a_quality_given_later_replaces_an_earlier_plan():
    compiled = Options(plan=Plan.tapered(3), cache_ratio=0.5, forecast="reuse")
    later = compiled.override(check_overrides({"quality": "fast"}))
    assert later == Options(quality="fast", forecast="reuse")


@pytest.mark.parametrize("quality", QUALITIES)
def test_the_runtime_follows_a_quality(quality):
    model = toy(quality=quality)
    Euler(model, steps=28).run()
    assert sd.stats(model).dense == len(QUALITIES[quality].dense)


def test_a_run_longer_than_was_thought_ends_dense():
    schedule = Schedule.of(Options().resolve(), (16,))
    found = [schedule.decide(Place(i, math.inf, 28, 28))[0] for i in range(40)]
    assert all(found[28:]) and not all(found[:28])


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_in_a_run_of_few_steps_every_one_is_dense(steps):
    times = sigmas(steps)[:-1]
    schedule = Schedule.of(Options().resolve(), (16,))
    places = [Place.of(times[: i + 1], None, 28) for i in range(steps)]
    assert [schedule.decide(place)[0] for place in places] == [16] * steps


@pytest.mark.parametrize("given", [True, False])
def test_an_all_dense_plan_leaves_nothing_out(given):
    uniform = torch.linspace(1, 0.003, 28, dtype=torch.float64)
    times = (3 * uniform / (1 + 2 * uniform)).tolist()
    schedule = Schedule.of(Options(plan=Plan.of(28, range(28))).resolve(), (16,))
    places = [Place.of(times[: i + 1], times if given else None, 28) for i in range(28)]
    assert [schedule.decide(place)[0] for place in places] == [16] * 28


@pytest.mark.parametrize(
    ("tokens", "ratio", "computed"),
    [(4096, 0.95, 208), (1024, 0.75, 256), (1024, 0.99, 10), (70, 0.05, 70), (16, 0.75, 4)],
)
def test_many_tokens_are_computed_in_the_multiples_that_kernels_like(tokens, ratio, computed):
    schedule = Schedule.of(Options(cache_ratio=ratio).resolve(), (tokens,))
    assert schedule.active == computed


def karras(steps: int) -> list[float]:
    """Sigmas from 1 to 0.05, spaced as Karras et al. 2022 do."""
    ends = (1.0 ** (1 / 7), 0.05 ** (1 / 7))
    return [(ends[0] + i / (steps - 1) * (ends[1] - ends[0])) ** 7 for i in range(steps)]


@pytest.mark.parametrize("steps", [20, 28, 50])
@pytest.mark.parametrize("rising", [False, True])
def test_uneven_times_have_the_dense_steps_that_were_asked_for_where_the_noise_is(steps, rising):
    """Karras sigmas are close together at the end, where little is left to be done."""
    settings = Options(plan=Plan.of(28, DENSE)).resolve()
    schedule = Schedule.of(settings, [64])
    times = [1 - time for time in karras(steps)] if rising else karras(steps)
    places = [Place.of(times[: i + 1], times, schedule.usual) for i in range(steps)]
    dense = [i for i, place in enumerate(places) if schedule.decide(place)[0]]
    assert len(dense) == len(settings.plan.dense)
    assert dense[0] == 0 and dense[-1] == steps - 1
    by_number = [i for i in range(steps) if schedule.decide(Place.known(i, steps))[0]]
    assert sum(times[i] for i in dense) * (-1 if rising else 1) > sum(
        times[i] for i in by_number
    ) * (-1 if rising else 1)


def round_ends(steps: int) -> list[float]:
    """Sigmas close together at both ends, as those of a beta distribution are."""
    return [(1 + math.cos(math.pi * i / steps)) / 2 for i in range(steps)]


@pytest.mark.parametrize("spaced", [karras, round_ends])
@pytest.mark.parametrize("steps", [28, 50])
@pytest.mark.parametrize("rising", [False, True])
def test_uneven_times_that_nobody_knows_have_the_dense_steps_all_the_same(spaced, steps, rising):
    settings = Options(quality="balanced").resolve()
    schedule = Schedule.of(settings, [64])
    times, dense = [1 - time if rising else time for time in spaced(steps)], []
    for index in range(steps):
        place = Place.of(times[: index + 1], None, schedule.usual, dense)
        dense += [index] if schedule.decide(place)[0] else []
    assert 0 <= len(dense) - len(settings.plan.dense) <= 2
    assert max(b - a for a, b in pairwise(dense)) <= steps // 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [1.0, 1.15, 3.0, 7.0, 12.0])
@pytest.mark.parametrize("begins", [1.0, 0.6])
def test_even_times_are_never_taken_for_uneven_ones(dtype, shift, begins):
    for steps in (10, 28, 50):
        even = torch.linspace(begins, 0, steps + 1, dtype=torch.float64)[:-1]
        for unit in (1, 1000):
            times = (unit * shift * even / (1 + (shift - 1) * even)).to(dtype).tolist()
            assert not any(uneven_so_far(times[: index + 1]) for index in range(steps))


def test_a_step_that_may_be_the_last_of_uneven_times_is_not_taken_for_a_short_one():
    """Karras sigmas stop short of 0, and one long step does the rest."""
    times = karras(28)
    assert next_time(times[:14], None) == pytest.approx(times[14], rel=0.01)
    assert next_time(times, None) == 0


@pytest.mark.parametrize("shift", [0.5, 1.0, 1.15, 3.0, 7.0])
def test_a_flow_of_any_shift_goes_by_number(shift):
    even = [1 - i / 28 for i in range(28)]
    times = [shift * u / (1 + (shift - 1) * u) for u in even]
    assert Place.of(times[:5], times, 28).progress is None
    scaled = [1000 * time for time in times]
    assert Place.of(scaled[:5], scaled, 28).progress is None


def test_fewer_uneven_times_than_dense_steps_are_all_dense():
    schedule = Schedule.of(Options(quality="balanced").resolve(), [64])
    times = karras(9)
    places = [Place.of(times[: i + 1], times, schedule.usual) for i in range(9)]
    assert all(schedule.decide(place)[0] for place in places)


def test_times_that_are_no_noise_count_by_their_number():
    """EDM's are log(sigma) / 4, which passes through 0; the model's own noise is not told by it."""
    levels = torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 28) ** 7
    times = (levels.log() / 4).tolist()
    plan = Schedule.of(Options(plan=Plan.of(28, DENSE)).resolve(), (16,))
    places = [Place.of(times[: i + 1], times, 28) for i in range(28)]
    assert dense_of([plan.decide(place)[0] for place in places]) == list(DENSE)
