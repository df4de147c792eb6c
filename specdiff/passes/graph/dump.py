"""Dump: the graph after each pass, as numbered files that can be read, run and compared."""

from __future__ import annotations

import difflib
import itertools
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import fx

from specdiff.passes.base import Notes, PassRecord
from specdiff.passes.graph.python_file import constants_of, to_python

log = logging.getLogger(__name__)


class Dump:
    """The folder of one graph: `01_normalize.py`, its changes in `01_normalize.diff`, and so on.

    A file that cannot be written is reported; it never stops a compilation.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._written = 0
        self._previous: tuple[str, list[str]] | None = None

    @classmethod
    def below(cls, dump_dir: Path) -> Dump | None:
        """A new folder graph_0, graph_1, ... in `dump_dir`; None if none can be made."""
        try:
            dump_dir.mkdir(parents=True, exist_ok=True)
            for number in itertools.count():
                folder = dump_dir / f"graph_{number}"
                if not folder.exists():
                    folder.mkdir()
                    return cls(folder)
        except OSError as error:
            log.warning("nothing is dumped: %s", error)
        return None

    def observe(self, record: PassRecord, module: fx.GraphModule, notes: Notes) -> None:
        """Write the code after a pass and its difference from the code before."""
        name = f"{self._written:02d}_{record.name}"
        self._written += 1
        unfailing(lambda: self._write(name, record, module, notes))

    def _write(self, name: str, record: PassRecord, module: fx.GraphModule, notes: Notes) -> None:
        text = to_python(module, str(record), notes)
        lines = text.splitlines(keepends=True)
        (self.folder / f"{name}.py").write_text(text, encoding="utf-8")
        constants = constants_of(module)
        if constants:
            torch.save(constants, self.folder / f"{name}.pt")
        if self._previous is not None:
            before, old = self._previous
            changes = difflib.unified_diff(old, lines, before, f"{name}.py", n=1)
            (self.folder / f"{name}.diff").write_text("".join(changes), encoding="utf-8")
        self._previous = (f"{name}.py", lines)


def unfailing(work: Callable[[], object]) -> None:
    """Run `work`; log an error instead of raising it."""
    try:
        work()
    except Exception as error:
        log.warning("a dump is not complete", exc_info=error)
