"""Running an evaluation: method by method, phase by phase, each kept as soon as it is done."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdiff.errors import SpecdiffError
from specdiff.evaluation.candidates import DENSE, Candidate
from specdiff.evaluation.findings import Finding, Findings
from specdiff.evaluation.measuring import (
    Bench,
    compare_pictures,
    draw_pictures,
    measure_flops,
    time_pictures,
)

PHASES = ("draw", "compare", "time", "flops")
"""Any of them may be left for later, or for another machine."""
RESULTS, LATENTS = "results.json", "latents"
WORDS_OF_A_REASON = 300
"""Letters of an error of a peer that the table keeps."""


@dataclass
class Campaign:
    """One evaluation and the folder it grows in.

    Attributes:
        bench: What all methods are measured with.
        findings: What is known already; grows.
        folder: Where `RESULTS` lies, and in `LATENTS` what was drawn.
        deadline: When to begin nothing more, by `time.monotonic`; None: never.
    """

    bench: Bench
    findings: Findings
    folder: Path
    deadline: float | None = None

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
            if phase in phases and not self._finding(candidate).has(phase)
        ]

    def _finding(self, candidate: Candidate) -> Finding:
        fresh = Finding(candidate.family, candidate.steps, dict(candidate.settings))
        return self.findings.methods.get(candidate.name, fresh)

    def _measure(self, candidate: Candidate, phase: str) -> None:
        if phase == "compare":
            self._measure(DENSE, "draw")
            self._measure(candidate, "draw")
        finding = self._finding(candidate)
        if finding.has(phase):  # a phase that failed took the others with it
            return
        self.findings.begin(phase)
        try:
            values = self._values(candidate, phase)
        except Exception as error:
            if phase == "compare" or not candidate.is_peer:
                raise
            finding.reason = _reason(error)
            values = {}
        if not finding.reason:
            finding.add(phase, values)
        self.findings.methods[candidate.name] = finding

    def _values(self, candidate: Candidate, phase: str) -> dict[str, Any]:
        if phase == "flops":
            return measure_flops(self.bench, candidate)
        if phase == "time":
            return time_pictures(self.bench, candidate)
        if phase == "compare":
            ours, dense = self._drawn(candidate), self._drawn(DENSE)
            return compare_pictures(self.bench, ours, dense)
        values, latents = draw_pictures(self.bench, candidate)
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


def _reason(error: Exception) -> str:
    """One line of an error that a reader of the table understands."""
    text = " ".join(str(error).split())[:WORDS_OF_A_REASON]
    return text if isinstance(error, SpecdiffError) else f"{type(error).__name__}: {text}"
