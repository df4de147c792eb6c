"""Running an evaluation: method by method, phase by phase, each kept as soon as it is done."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdiff.errors import SpecdiffError
from specdiff.evaluation.candidates import DENSE, Candidate
from specdiff.evaluation.findings import Finding, Findings
from specdiff.evaluation.measuring import Bench, measure_flops, measure_pictures

PHASES = ("pictures", "flops")
RESULTS, REFERENCE = "results.json", "dense.pt"
WORDS_OF_A_REASON = 300
"""Letters of an error of a peer that the table keeps."""


@dataclass
class Campaign:
    """One evaluation and the folder it grows in.

    Attributes:
        bench: What all methods are measured with.
        findings: What is known already; grows.
        folder: Where `RESULTS` and the dense latents lie.
        deadline: When to begin nothing more, by `time.monotonic`; None: never.
    """

    bench: Bench
    findings: Findings
    folder: Path
    deadline: float | None = None
    _reference: list[Tensor] = field(default_factory=list)

    def run(
        self, candidates: Sequence[Candidate], phases: Sequence[str] = PHASES
    ) -> Iterator[None]:
        """Measure what is not known yet, until the deadline; yields after each measurement."""
        for candidate, phase in self.left(candidates, phases):
            if self.deadline is not None and time.monotonic() > self.deadline:
                return
            if phase == "pictures" and candidate is not DENSE:
                self._require_reference()
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
        finding = self._finding(candidate)
        if finding.has(phase):  # a phase that failed took the other with it
            return
        try:
            values = self._values(candidate, phase)
        except Exception as error:
            if not candidate.is_peer:
                raise
            finding.reason = _reason(error)
            values = {}
        if not finding.reason:
            finding.add(phase, values)
        self.findings.methods[candidate.name] = finding

    def _values(self, candidate: Candidate, phase: str) -> dict[str, Any]:
        if phase == "flops":
            return measure_flops(self.bench, candidate)
        reference = None if candidate is DENSE else self._reference
        values, latents = measure_pictures(self.bench, candidate, reference)
        if candidate is DENSE:
            self._reference = latents
            torch.save(latents, self.folder / REFERENCE)
        return values

    def _require_reference(self) -> None:
        """Have the dense pictures at hand.

        Raises:
            SpecdiffError: The results came without them, as a copy from elsewhere does.
        """
        file = self.folder / REFERENCE
        if self._reference:
            return
        if DENSE.name in self.findings.methods and not file.exists():
            raise SpecdiffError(f"{file} is gone: remove {self.folder / RESULTS} or restore it")
        if not self._finding(DENSE).has("pictures"):
            self._measure(DENSE, "pictures")
        self._reference = torch.load(file, weights_only=True)


def _reason(error: Exception) -> str:
    """One line of an error that a reader of the table understands."""
    text = " ".join(str(error).split())[:WORDS_OF_A_REASON]
    return text if isinstance(error, SpecdiffError) else f"{type(error).__name__}: {text}"
