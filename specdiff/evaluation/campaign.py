"""Campaign: measure method by method, phase by phase; save after each."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdiff.errors import SpecdiffError
from specdiff.evaluation.candidates import reference
from specdiff.evaluation.findings import Finding, Findings
from specdiff.evaluation.measuring import (
    Setup,
    compare_pictures,
    compare_solutions,
    draw_pictures,
    measure_flops,
    time_pictures,
)
from specdiff.evaluation.method import DENSE, Candidate, Refused

PHASES = ("draw", "compare", "solution", "time", "flops")
"""Each may be run later, or on another machine."""
RESULTS, LATENTS = "results.json", "latents"


@dataclass
class Campaign:
    """One evaluation and the folder it grows in.

    Attributes:
        setup: What all methods are measured with.
        findings: What is known already; grows.
        folder: Where `RESULTS` lies, and in `LATENTS` what was drawn.
        deadline: When to begin nothing more, by `time.monotonic`; None: never.
    """

    setup: Setup
    findings: Findings
    folder: Path
    deadline: float | None = None
    refused: set[str] = field(default_factory=set)
    """Methods that have failed in this run; those of earlier runs are tried again."""

    def run(
        self, candidates: Sequence[Candidate], phases: Sequence[str] = PHASES
    ) -> Iterator[None]:
        """Measure what is not known yet, until the deadline; yields after each measurement."""
        for candidate, phase in self.left(candidates, phases):
            if self.deadline is not None and time.monotonic() > self.deadline:
                return
            self._measure(candidate, phase)
            self.findings.save(self.folder / RESULTS)
            gc.collect()
            yield

    def left(
        self, candidates: Sequence[Candidate], phases: Sequence[str] = PHASES
    ) -> list[tuple[Candidate, str]]:
        """What is not known yet, a method's phases next to each other."""
        return [
            (candidate, phase)
            for candidate in candidates
            for phase in PHASES
            if phase in phases and not self._settled(candidate, phase)
        ]

    @property
    def solved(self) -> Candidate:
        """What counts as the solution."""
        return reference(self.setup.subject)

    def _settled(self, candidate: Candidate, phase: str) -> bool:
        return candidate.name in self.refused or self._finding(candidate).has(phase)

    def _finding(self, candidate: Candidate) -> Finding:
        fresh = Finding(candidate.family, candidate.steps, dict(candidate.settings))
        return self.findings.methods.get(candidate.name, fresh)

    def _measure(self, candidate: Candidate, phase: str) -> None:
        if phase in ("compare", "solution"):
            self._measure(DENSE if phase == "compare" else self.solved, "draw")
            self._measure(candidate, "draw")
        if self._settled(candidate, phase):  # after a refusal no phase of a method is tried
            return
        self.findings.begin(phase)
        finding = self._finding(candidate)
        try:
            finding.add(phase, self._values(candidate, phase))
            finding.reason = ""
        except Refused as error:
            if not candidate.is_peer:
                raise
            finding.reason = str(error)
            self.refused.add(candidate.name)
        self.findings.methods[candidate.name] = finding

    def _values(self, candidate: Candidate, phase: str) -> dict[str, Any]:
        if phase == "flops":
            return measure_flops(self.setup, candidate)
        if phase == "time":
            return time_pictures(self.setup, candidate)
        if phase == "compare":
            ours, dense = self._drawn(candidate), self._drawn(DENSE)
            return compare_pictures(self.setup, ours, dense)
        if phase == "solution":
            ours, solutions = self._drawn(candidate), self._drawn(self.solved)
            return compare_solutions(self.setup, ours, solutions)
        values, latents = draw_pictures(self.setup, candidate)
        file = self._latents(candidate)
        file.parent.mkdir(exist_ok=True)
        torch.save(latents, file)
        return values

    def _latents(self, candidate: Candidate) -> Path:
        return self.folder / LATENTS / (re.sub(r"[^\w.]+", "-", candidate.name) + ".pt")

    def _drawn(self, candidate: Candidate) -> list[Tensor]:
        """Latents of a method.

        Raises:
            SpecdiffError: The results came without them, as a copy from elsewhere does.
        """
        file = self._latents(candidate)
        if not file.exists():
            raise SpecdiffError(f"{file} is gone: remove {self.folder / RESULTS} or restore it")
        latents: list[Tensor] = torch.load(file, weights_only=True)
        return latents
