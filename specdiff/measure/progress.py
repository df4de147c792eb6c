"""The progress bar of the commands that measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def progress_bar(
    console: Console, total: int, description: str = "loading"
) -> Iterator[Callable[..., Any]]:
    """A bar of `total` parts, shown inside the block.

    Yields:
        What updates it, with `advance=`, `completed=` and `description=` as rich takes them.
    """
    # Not markup: prompts may hold square brackets.
    text = TextColumn("{task.description}", markup=False)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), text)
    with Progress(*columns, console=console) as progress:
        yield partial(progress.update, progress.add_task(description, total=total))
