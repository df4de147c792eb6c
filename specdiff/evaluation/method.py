"""What a method is that can be compared: specdiff's settings, fewer steps and the peers'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from specdiff.errors import SpecdiffError
from specdiff.models.subject import STEPS
from specdiff.runtime.records.stats import Stats
from specdiff.settings import QUALITIES

OURS = "specdiff"
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


def untouched(pipeline: Any) -> Any:
    """The pipeline as it came: dense, eager."""
    return pipeline


DENSE = Candidate("dense", "dense", STEPS, {}, compile_whole, untouched)
SOLVED = "solution"
"""Name of the method whose pictures count as the solution of the sampling equation."""
