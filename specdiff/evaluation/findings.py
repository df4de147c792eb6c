"""Findings: the results of an evaluation so far, in one JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from specdiff.errors import SpecdiffError

SCHEMA = 2
"""Number of the file's layout; grows when a field changes its meaning or goes away."""
REFERENCE_FAMILY = "dense"
SPEEDUP, PSNR, FEATURES, FLOPS = "speedup", "psnr_db", "feature_distance", "flops_share"
SOLUTION = "solution_db"
"""PSNR to the solution of the sampling equation; `PSNR` is to the dense run."""
WORST = "_worst_tenth"
"""Ends the name of a PSNR's mean over the worst tenth of pictures."""
LOWEST, EACH = "_lowest", "_each"
"""End the names of a PSNR's minimum, and of the list of all."""


@dataclass(frozen=True)
class Terms:
    """What decides a measurement; findings under different terms do not mix.

    Attributes:
        model: Name of the subject.
        steps: Denoising steps of the dense run.
        pictures: Pictures a method is compared on.
        pairs: Pairs of dense and method behind each time ratio.
        large_set: Pictures for the distance between sets and the probe; 0: neither.
        seed: Of the first picture.
        clock: What the times are of: "wall", or "cpu" where others keep the machine busy.
    """

    model: str
    steps: int
    pictures: int
    pairs: int
    large_set: int
    seed: int
    clock: str


@dataclass
class Finding:
    """The results of one method; `values` lacks what was not measured."""

    family: str
    steps: int
    settings: Mapping[str, Any]
    compiled: str = ""
    reason: str = ""
    """Why it could not be measured when last tried; empty if it could."""
    values: dict[str, Any] = field(default_factory=dict)

    def has(self, phase: str) -> bool:
        """Whether a phase is done."""
        return phase in self.values.get("phases", ())

    def add(self, phase: str, values: Mapping[str, Any]) -> None:
        """Keep what a phase measured."""
        phases = sorted({*self.values.get("phases", ()), phase})
        self.values |= {**values, "phases": phases}


@dataclass
class Findings:
    """All methods measured so far under the same terms.

    Attributes:
        terms: What decides the measurements.
        environment: Machine and versions of this run.
        methods: What is known, by name.
        environments: Machine and versions that each phase began with; phases may be measured on
            different machines, one phase may not.
    """

    terms: Terms
    environment: Mapping[str, Any]
    methods: dict[str, Finding] = field(default_factory=dict)
    environments: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, file: Path, terms: Terms, environment: Mapping[str, Any]) -> Findings:
        """Continue from the file if there is one.

        Raises:
            SpecdiffError: The file holds findings under other terms, or none.
        """
        if not file.exists():
            return cls(terms, environment)
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            if stored["schema"] != SCHEMA or stored["plan"] != asdict(terms):
                raise SpecdiffError(
                    f"{file} holds results under other terms ({stored['plan']}):"
                    " choose another --out"
                )
            methods = {name: Finding(**finding) for name, finding in stored["methods"].items()}
            return cls(terms, environment, methods, stored["environments"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise SpecdiffError(
                f"{file} holds no results ({error!r}): remove it or choose another --out"
            ) from error

    def begin(self, phase: str) -> None:
        """Note where a phase is measured.

        Raises:
            SpecdiffError: It began on another device, with whose figures these do not compare.
        """
        began = self.environments.setdefault(phase, self.environment)
        before, now = began.get("device"), self.environment.get("device")
        if before != now:
            raise SpecdiffError(f"{phase!r} began on {before}, this is {now}: choose another --out")

    def save(self, file: Path) -> None:
        """Write the file whole or not at all."""
        record = {
            "schema": SCHEMA,
            "plan": asdict(self.terms),
            "environments": self.environments,
            "methods": {name: asdict(finding) for name, finding in self.methods.items()},
        }
        part = file.with_suffix(".part")
        part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        part.replace(file)

    def rivals(self, *fields: str) -> dict[str, Finding]:
        """The methods but the dense one for which all of these values are known, by name."""
        return {
            name: finding
            for name, finding in self.methods.items()
            if finding.family != REFERENCE_FAMILY
            and all(finding.values.get(field) is not None for field in fields)
        }


def frontier(findings: Findings, measure: str, *, higher_is_better: bool) -> list[str]:
    """Methods that no other beats in both speedup and the measure, by name, fastest first."""
    sign = 1 if higher_is_better else -1
    points = findings.rivals(SPEEDUP, measure)
    ordered = sorted(points, key=lambda name: -points[name].values[SPEEDUP])
    best, unbeaten = float("-inf"), []
    for name in ordered:
        value = sign * points[name].values[measure]
        if value > best:
            best = value
            unbeaten.append(name)
    return unbeaten
