"""The methods to compare: dense, fewer steps, specdiff's settings and the peers'."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import specdiff
from specdiff.errors import SpecdiffError
from specdiff.evaluation.subject import STEPS, Subject
from specdiff.plan import Plan
from specdiff.runtime.records.stats import Stats
from specdiff.settings import QUALITIES

OURS = "specdiff"
FEWER_STEPS = (7, 9, 12, 14, 18)
SPECDIFF: Mapping[str, Mapping[str, Any]] = {
    "specdiff, closest": {"quality": "closest"},
    "specdiff, near-lossless": {"quality": "near-lossless"},
    "specdiff, balanced": {"quality": "balanced"},
    "specdiff, fast": {"quality": "fast"},
    "specdiff, dense every 2": {"plan": Plan.tapered(2).to_json()},
    "specdiff, dense every 3": {"plan": Plan.tapered(3).to_json()},
    "specdiff, dense every 5": {"plan": Plan.tapered(5).to_json()},
    "specdiff, dense every 8": {"plan": Plan.tapered(8).to_json()},
    "specdiff, no correction": {"ablation": {"correction": False}},
    "specdiff, ratio 0.75": {"plan": Plan.tapered(4).to_json(), "cache_ratio": 0.75},
    "specdiff, ratio 0.9": {"plan": Plan.tapered(4).to_json(), "cache_ratio": 0.9},
    "specdiff, paper 0.75": {"method": "paper", "cache_ratio": 0.75},
    "specdiff, paper 0.9": {"method": "paper", "cache_ratio": 0.9},
}
"""Options by name; a default that is tuned belongs in `specdiff.settings`, not here."""
DIGEST = 6
"""Letters of the hash of a plan's file in the name of its method."""
PRESETS = ("dense", *(f"{OURS}, {quality}" for quality in QUALITIES))
"""Methods that also draw the large set for the distance between sets and the probe."""


class Refused(SpecdiffError):
    """The method cannot be measured on this pipeline; the message says why."""


@dataclass(frozen=True)
class Prepared:
    """A pipeline ready to draw.

    Attributes:
        pipeline: What `Subject.draw` takes.
        compiled: How much of the transformer torch.compile covers: graph, blocks, parts, nothing.
        usage: Reads specdiff's counters; None for other methods.
    """

    pipeline: Any
    compiled: str
    usage: Callable[[], Stats] | None = None


@dataclass(frozen=True)
class Candidate:
    """One method with one setting.

    Attributes:
        name: Unique; what tables show.
        family: What its points are joined by in the plot.
        steps: Denoising steps of a picture.
        settings: What was set, as it is to be written down.
        prepare: Turns a fresh pipeline into one that draws this way; raises for a reason.
        eager: The same without compiling, for counting FLOPs; None: the runtime's counters serve.
        is_peer: Others' work: if it fails, the table says why, and the evaluation goes on.
    """

    name: str
    family: str
    steps: int
    settings: Mapping[str, Any]
    prepare: Callable[[Any], Prepared]
    eager: Callable[[Any], Any] | None = None
    is_peer: bool = False

    @property
    def in_large_set(self) -> bool:
        """Whether it is also measured on the large set."""
        return self.name in PRESETS


def compile_whole(pipeline: Any) -> Prepared:
    """Compile the transformer with Inductor, one graph or an error."""
    pipeline.transformer = torch.compile(pipeline.transformer, fullgraph=True, dynamic=False)
    return Prepared(pipeline, "graph")


def _untouched(pipeline: Any) -> Any:
    return pipeline


DENSE = Candidate("dense", "dense", STEPS, {}, compile_whole, _untouched)


def fewer_steps() -> list[Candidate]:
    """The zero-effort baseline: the dense model, for fewer steps of the same schedule."""
    return [
        Candidate(f"{n} steps", "fewer steps", n, {"steps": n}, compile_whole, _untouched)
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


def all_candidates(subject: Subject, plans: Sequence[Path] = ()) -> list[Candidate]:
    """Every method, dense first, and specdiff by these plans."""
    from specdiff.evaluation.peers import peers

    return [DENSE, *fewer_steps(), *own(subject, plans), *peers(subject)]


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
