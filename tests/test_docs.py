"""The pages say what the code does."""

import ast
import dataclasses
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from specdiff import pipeline
from specdiff.cli.main import app
from specdiff.options import NO_LONGER, OPTIONS, Options
from specdiff.passes.base import Pass
from specdiff.plan import Plan
from specdiff.runtime.tokens.schedule import Place, Schedule
from tests.test_structure import WALLS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHER_PAGES = [ROOT / "CHANGELOG.md", *sorted((ROOT / "examples").rglob("*.md"))]
OPTIONS_PAGE = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
DESIGN_PAGE = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
COMMANDS = [
    'python3 -m venv .venv && .venv/bin/pip install -q -e ".[demo]" && .venv/bin/specdiff demo',
    'python3 -m venv .venv && .venv/bin/pip install -q -e ".[test]" && .venv/bin/python -m pytest',
]
"""What newcomers and their machines run, to the letter."""
NO_OPTIONS = {
    "backend", "dynamic", "fullgraph", "lookahead", "mode", "options", "scheduler", "solve",
    "warmup", "every",
}  # fmt: skip
"""Names before an equals sign that belong to torch or a plan, or are no options but arguments."""
TAKE_OPTIONS = {"specdiff.attach", "specdiff.backend", "specdiff.configure", "specdiff.session"}


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=page_name)


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a page in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What links to a page may end in, as GitHub makes it of its titles."""
    titles = re.findall(r"^#+ (.+)$", prose(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> Iterator[str]:
    """The relative links of a page that lead nowhere."""
    for link in re.findall(r"\]\(([^)\s:]+)\)", page.read_text(encoding="utf-8")):
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=page_name)
def test_relative_links_resolve(page: Path) -> None:
    assert not list(broken_links(page))


def test_the_readme_is_short_and_its_commands_stay() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 180
    assert [line for line in text.splitlines() if line.startswith("python3 ")] == COMMANDS


def exists(dotted: str) -> bool:
    """Whether there is such a module, or a name in one."""
    parts, found = dotted.split("."), importlib.import_module("specdiff")
    for depth, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(parts[:depth]))
            except ModuleNotFoundError:
                return False
        found = getattr(found, part)
    return True


@every_page
def test_names_of_the_package_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    names = set(re.findall(r"\bspecdiff(?:\.[A-Za-z_]\w*)+", text))
    assert not [name for name in names if not exists(name)]


@every_page
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    files = re.findall(r"\b(?:specdiff|tests|examples|docs)/[\w/.\-]*\w", text)
    assert not [file for file in files if not (ROOT / file).exists()]


def options_in_code(text: str) -> Iterator[tuple[str, ast.expr]]:
    """Names and values of the options that a page's examples hand over."""
    for block in blocks(text, "python"):
        for node in ast.walk(ast.parse(block)):
            if not isinstance(node, ast.Call):
                continue
            for word in node.keywords:
                if word.arg == "options" and isinstance(word.value, ast.Dict):
                    for key, value in zip(word.value.keys, word.value.values, strict=True):
                        yield ast.literal_eval(key), value
                elif ast.unparse(node.func) in TAKE_OPTIONS and word.arg != "timesteps":
                    yield word.arg, word.value


def options_in_prose(text: str) -> Iterator[tuple[str, ast.expr]]:
    """The same of its sentences, as `quality="fast"`, and of commands, as --option quality=fast."""
    for name, value in re.findall(r"`([a-z]\w*)=([^`]+)`", prose(text)):
        yield name, ast.parse(value, mode="eval").body
    for name, value in re.findall(r"--option (\w+)=(\w+)", text):
        yield name, ast.Constant(value)


@every_page
def test_options_exist_and_take_these_values(page: Path) -> None:
    text = page.read_text(encoding="utf-8").split("## Options of earlier versions")[0]
    for name, value in (*options_in_code(text), *options_in_prose(text)):
        if name in NO_OPTIONS:
            continue
        assert name in OPTIONS
        if isinstance(value, ast.Constant):
            Options(**{name: value.value})


@every_page
def test_commands_exist(page: Path) -> None:
    known = typer.main.get_command(app).commands
    for block in blocks(page.read_text(encoding="utf-8"), "sh"):
        for line in block.splitlines():
            words = shlex.split(line.rpartition("&& ")[2], comments=True)
            if not words or not words[0].endswith("specdiff"):
                continue
            taken = {name for parameter in known[words[1]].params for name in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= taken


def table(page: str, head: str) -> list[list[str]]:
    """The cells of the rows below a head, quotes off."""
    rows = page.split(head + "\n")[1].splitlines()[1:]
    rows = rows[: next(i for i, row in enumerate(rows) if not row.startswith("|"))]
    return [[cell.strip(" `") for cell in row.strip("|").split(" | ")] for row in rows]


def test_the_design_states_the_walls() -> None:
    stated = table(DESIGN_PAGE, "| who | never imports | for |")
    assert [cells[:2] for cells in stated] == [list(wall[:2]) for wall in WALLS]


def test_the_design_lists_the_passes() -> None:
    kinds = [v for v in vars(pipeline).values() if isinstance(v, type) and issubclass(v, Pass)]
    listed = [cells[0] for cells in table(DESIGN_PAGE, "| pass | what it does |")]
    assert sorted(listed) == sorted(kind.name for kind in kinds)


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
