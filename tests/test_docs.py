"""The pages say what the code does."""

import ast
import dataclasses
import json
import re
from pathlib import Path

from specdiff.options import NO_LONGER, OPTIONS, Options
from specdiff.plan import Plan
from specdiff.runtime.tokens.schedule import Place, Schedule

OPTIONS_PAGE = (Path(__file__).parents[1] / "docs" / "options.md").read_text(encoding="utf-8")


def test_the_page_explains_every_option() -> None:
    explained = [line.split("`")[1] for line in OPTIONS_PAGE.splitlines() if line[:3] == "| `"]
    current = [name for name in explained if "=" not in name and name not in NO_LONGER]
    assert current == list(OPTIONS)


def test_the_page_states_the_defaults() -> None:
    fixed = {option.name: option.default for option in dataclasses.fields(Options)}
    resolved = [dataclasses.asdict(Options(method=m).resolve()) for m in ("history", "paper")]
    stated = set()
    for line in OPTIONS_PAGE.splitlines():
        if not line.startswith("| `") or " Default: " not in line:
            continue
        name, said = line.split("`")[1], line.rpartition(" Default: ")[2].rstrip(" |")
        usual, _, paper = said.partition('; `"paper"`: ')
        expected = [found.get(name, fixed[name]) for found in resolved]
        assert [ast.literal_eval(text.strip("`")) for text in (usual, paper or usual)] == expected
        stated.add(name)
    left_out = {name for name, default in fixed.items() if default is None}
    assert stated >= {"cache_ratio", "method", "forecast", "text_steps"}
    assert stated >= set(OPTIONS) - left_out


def test_the_page_says_what_became_of_the_options_of_old() -> None:
    table = OPTIONS_PAGE.split("## Options of earlier versions")[1]
    assert all(f"`{name}" in table for name in NO_LONGER)


def test_the_plans_of_the_page_are_plans() -> None:
    blocks = OPTIONS_PAGE.split("```json\n")[1:]
    plans = [Options(plan=json.loads(block.split("```")[0])).plan for block in blocks]
    assert plans[0] == Plan.tapered(4, cache_ratio=0.9) and len(plans) == 2
    for kind, number in (("tapered", 4), ("every", 4), ("warmup", 3)):
        plan, call = getattr(Plan, kind)(number), f"{kind}({number})"
        schedule = Schedule.of(Options(plan=plan).resolve(), (16,))
        counts = [schedule.decide(Place.known(index, 28))[0] for index in range(28)]
        drawn = "".join("D" if count else "-" for count in counts)
        assert re.search(rf"specdiff\.Plan\.{re.escape(call)} +# {drawn}", OPTIONS_PAGE), drawn
