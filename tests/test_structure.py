"""The house: which room may import which. Imports in functions and for types alone count too."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest

import specdiff

ROOT = Path(specdiff.__file__).parents[1]

WALLS = [
    # who, never imports whom, because
    ("passes", "runtime", "what the passes make runs anywhere: `program` is all that both know"),
    ("runtime", "passes", "a step needs programs, not how they came about"),
    ("runtime.sampler", "runtime.streams", "the sampler is known by numbers, whoever has them"),
    ("runtime.sampler", "runtime.step", "what the sampler did is known before a step is chosen"),
    ("runtime.tokens", "runtime.streams", "tokens are chosen from a history, whoever's it is"),
    ("runtime.tokens", "runtime.step", "a step asks which tokens; they ask nothing of it"),
    ("runtime.streams", "runtime.step", "a stream remembers what steps did and calls none"),
    ("passes.rules", "passes.select", "what an operator does is true whatever is selected"),
    ("passes.select", "passes.emit", "what to compute is decided before it is written down"),
    ("models", "measure", "a model is drawn with, whoever measures it"),
    ("inspect", "evaluation", "what is shown of a model is not what was measured of many methods"),
    ("runtime", "serve", "a server is one of many who call a model"),
    ("evaluation", "cli", "commands hand work on; who does it knows no command line"),
]


def modules() -> dict[str, Path]:
    """Every file of the package by its dotted name; a folder's own file ends in `__init__`."""
    files = sorted((ROOT / "specdiff").rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name taken from it or nothing) of every import statement."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            yield from ((node.module or "", alias.name) for alias in node.names)


def file_imports() -> set[tuple[str, str]]:
    """(importing file, imported file), both of the package."""
    known = modules()

    def home(module: str, name: str) -> str | None:
        places = (f"{module}.{name}", f"{module}.{name}.__init__", module, f"{module}.__init__")
        return next((place for place in places if place in known), None)

    return {
        (file, target)
        for file, path in known.items()
        for module, name in imported(ast.parse(path.read_text(encoding="utf-8")))
        if (target := home(module, name)) is not None and target != file
    }


def neighbours() -> dict[str, networkx.DiGraph]:
    """For each folder: which of the files and folders in it imports which other one."""
    graphs: dict[str, networkx.DiGraph] = defaultdict(networkx.DiGraph)
    for importer, target in file_imports():
        here, there = importer.split("."), target.split(".")
        depth = next(i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b)
        graphs[".".join(here[:depth])].add_edge(here[depth], there[depth])
    return graphs


def test_every_import_of_the_package_is_seen():
    edges = file_imports()
    assert ("specdiff.compiler", "specdiff.pipeline") in edges
    assert ("specdiff.inspect.publish", "specdiff.inspect.export") in edges  # in a function
    assert ("specdiff.__init__", "specdiff.compiler") in edges  # for types alone
    assert ("specdiff.passes.select.axes", "specdiff.passes.rules.__init__") in edges


def test_nothing_imports_in_a_circle():
    """Neither files nor folders: in each folder, its files and folders import in one direction.

    A circle of files in different folders is one of the folders that hold them.
    """
    circles = [
        (folder, sorted(circle))
        for folder, graph in neighbours().items()
        for circle in networkx.strongly_connected_components(graph)
        if len(circle) > 1
    ]
    assert not circles


@pytest.mark.parametrize(("room", "other", "reason"), WALLS)
def test_walls(room, other, reason):
    def lies_in(file: str, folder: str) -> bool:
        return file.startswith(f"specdiff.{folder}.")

    assert any(lies_in(file, room) for file in modules())
    assert any(lies_in(file, other) for file in modules())
    broken = [(a, b) for a, b in file_imports() if lies_in(a, room) and lies_in(b, other)]
    assert not broken, reason


def test_every_folder_says_what_is_in_it():
    folders = {path.parent for path in modules().values()}
    for folder in folders:
        text = (folder / "__init__.py").read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)), folder


def test_no_module_takes_the_name_of_what_is_public():
    """`import specdiff.tune` would put a module where the function `specdiff.tune` was."""
    public = {name: getattr(specdiff, name) for name in specdiff.__all__}
    for module in pkgutil.walk_packages(specdiff.__path__, "specdiff."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name, value in public.items():
        assert getattr(specdiff, name) is value, name
