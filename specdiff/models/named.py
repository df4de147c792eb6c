"""Named: a function of the user's, by its name on the command line."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specdiff.errors import SpecdiffError


def function_named(target: str) -> Callable[[], Any]:
    """The function that `package.module:function` or `path/to/file.py:function` names.

    Raises:
        SpecdiffError: There is none, or it cannot be called without arguments.
    """
    origin, separator, name = target.rpartition(":")
    if not separator or not origin or not name:
        raise SpecdiffError(
            f"{target!r}: expected demo, package.module:function or file.py:function"
        )
    try:
        module = _from_file(Path(origin)) if origin.endswith(".py") else _by_name(origin)
    except (ImportError, OSError) as error:
        raise SpecdiffError(f"cannot import {origin}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise SpecdiffError(f"{origin} has no function {name}")
    if not _takes_nothing(function):
        raise SpecdiffError(f"{target}: must be a function that needs no arguments")
    checked: Callable[[], Any] = function
    return checked


def _takes_nothing(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError):  # the latter of built-in functions that do not say
        return False
    return True


def _by_name(name: str) -> Any:
    if "" not in sys.path:  # a console script does not look where it was called
        sys.path.insert(0, "")
    return importlib.import_module(name)


def _from_file(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
