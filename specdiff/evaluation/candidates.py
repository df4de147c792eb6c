"""The methods to compare: dense, fewer steps, specdiff's settings and the peers'."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import specdiff
from specdiff.errors import SpecdiffError
from specdiff.evaluation.method import (
    DENSE,
    OURS,
    SOLVED,
    Candidate,
    Prepared,
    compile_whole,
    untouched,
)
from specdiff.evaluation.peers import peers
from specdiff.evaluation.solvers import solvers
from specdiff.models.subject import STEPS, Subject
from specdiff.plan import Plan

FEWER_STEPS = (7, 9, 10, 12, 14, 18)
REFERENCE_STEPS = 150
SPECDIFF: Mapping[str, Mapping[str, Any]] = {
    "specdiff, closest": {"quality": "closest"},
    "specdiff, near-lossless": {"quality": "near-lossless"},
    "specdiff, balanced": {"quality": "balanced"},
    "specdiff, fast": {"quality": "fast"},
    "specdiff, dense every 2": {"plan": Plan.tapered(2).to_json()},
    "specdiff, dense every 3": {"plan": Plan.tapered(3).to_json()},
    "specdiff, dense every 5": {"plan": Plan.tapered(5).to_json()},
    "specdiff, dense every 8": {"plan": Plan.tapered(8).to_json()},
    "specdiff, near-lossless, solution": {"quality": "near-lossless", "target": "solution"},
    "specdiff, balanced, solution": {"quality": "balanced", "target": "solution"},
    "specdiff, all steps, solution": {"plan": Plan.every(1).to_json(), "target": "solution"},
    "specdiff, no correction": {"ablation": {"correction": False}},
    "specdiff, ratio 0.75": {"plan": Plan.tapered(4).to_json(), "cache_ratio": 0.75},
    "specdiff, ratio 0.9": {"plan": Plan.tapered(4).to_json(), "cache_ratio": 0.9},
    "specdiff, paper 0.75": {"method": "paper", "cache_ratio": 0.75},
    "specdiff, paper 0.9": {"method": "paper", "cache_ratio": 0.9},
}
"""Options by name; a default that is tuned belongs in `specdiff.settings`, not here."""
DIGEST = 6
"""Letters of the hash of a plan's file in the name of its method."""


def fewer_steps() -> list[Candidate]:
    """The zero-effort baseline: the dense model, for fewer steps of the same schedule."""
    return [
        Candidate(f"{n} steps", "fewer steps", n, {"steps": n}, compile_whole, untouched)
        for n in FEWER_STEPS
    ]


def own(subject: Subject, plans: Sequence[Path] = ()) -> list[Candidate]:
    """Specdiff at several settings, and by plans in files.

    Raises:
        OptionError: A file holds no plan.
    """
    planned = {_name_of(plan): {"plan": str(plan)} for plan in plans}
    settings = {**SPECDIFF, **planned}
    return [_own(name, {**subject.options, **options}) for name, options in settings.items()]


def _name_of(file: Path) -> str:
    """Of the method by a plan: tells files of one name apart, and one from what it was before."""
    Plan.load(file)
    return f"{OURS}, {file.name} {hashlib.sha256(file.read_bytes()).hexdigest()[:DIGEST]}"


def _own(name: str, options: Mapping[str, Any]) -> Candidate:
    def prepare(pipeline: Any) -> Prepared:
        compiled: Any = torch.compile(
            pipeline.transformer, backend="specdiff", fullgraph=True, options=dict(options)
        )
        pipeline.transformer = compiled
        return Prepared(pipeline, "graph", lambda: specdiff.stats(compiled))

    family = f"{OURS}, paper" if options.get("method") == "paper" else OURS
    return Candidate(name, family, STEPS, options, prepare)


def reference(subject: Subject) -> Candidate:
    """Steps of order two and more, so many that what is left of their error does not matter."""
    options = {**subject.options, "target": "solution", "plan": Plan.every(1).to_json()}

    def prepare(pipeline: Any) -> Prepared:
        pipeline.transformer.compile()
        specdiff.attach(pipeline.transformer, **options)
        return Prepared(pipeline, "parts")

    return Candidate(SOLVED, SOLVED, REFERENCE_STEPS, options, prepare)


def all_candidates(subject: Subject, plans: Sequence[Path] = ()) -> list[Candidate]:
    """Every method, dense first, and specdiff by these plans."""
    return [DENSE, *fewer_steps(), *solvers(), *own(subject, plans), *peers(subject)]


def choose(candidates: Sequence[Candidate], patterns: Sequence[str]) -> list[Candidate]:
    """Those whose names match a shell pattern; all if none is given.

    Raises:
        SpecdiffError: A pattern matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatch(one.name, pattern) for one in candidates):
            names = ", ".join(repr(one.name) for one in candidates)
            raise SpecdiffError(f"no method matches {pattern!r}; there are {names}")
    return [
        one
        for one in candidates
        if not patterns or any(fnmatch.fnmatch(one.name, pattern) for pattern in patterns)
    ]
