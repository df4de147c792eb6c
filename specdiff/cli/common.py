"""What several commands do: read options, check what they need, write and report."""

from __future__ import annotations

import ast
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from specdiff.errors import OptionError, SpecdiffError

console = Console()
errors = Console(stderr=True)


def parse_options(pairs: Sequence[str]) -> dict[str, object]:
    """Read `name=value` pairs; values are Python literals where they can be, else text.

    Raises:
        OptionError: A pair has no `=`, or neither specdiff nor Inductor takes it.
    """
    from specdiff.options import Options
    from specdiff.torch_adapter import inductor_keys

    options: dict[str, object] = {}
    for pair in pairs:
        name, separator, text = (part.strip() for part in pair.partition("="))
        if not separator:
            raise OptionError(f"expected name=value, got {pair!r}")
        try:
            options[name] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            options[name] = text
    Options.parse(options, inductor_keys())
    return options


def require_compiler() -> None:
    """Say what is missing before Inductor does, a minute later and in more words."""
    compiler = os.environ.get("CXX", "g++")
    if sys.platform == "linux" and shutil.which(compiler) is None:
        raise SpecdiffError(f"torch.compile needs a C++ compiler and found no {compiler}")


def make_folders(files: Sequence[Path]) -> None:
    """Make room for the results before minutes of work go into them."""
    for file in files:
        if file.is_dir():
            raise SpecdiffError(f"{file} is a folder, expected a file name")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            is_new = not file.exists()
            file.open("ab").close()  # permissions alone do not tell, root has them all
            if is_new:
                file.unlink()
        except OSError as error:
            raise SpecdiffError(f"cannot write {file}: {error}") from error


def write_figures(file: Path, figures: object) -> None:
    """Write a record as strict JSON and say where it went."""
    text = json.dumps(figures, indent=2, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8")
    console.print(f"figures: {file}", highlight=False)
