"""What `specdiff eval` does with its options."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from specdiff.errors import SpecdiffError
from specdiff.evaluation.campaign import PHASES, RESULTS, Campaign
from specdiff.evaluation.candidates import all_candidates, choose
from specdiff.evaluation.features import Probe
from specdiff.evaluation.findings import Findings, Terms
from specdiff.evaluation.measuring import Setup
from specdiff.evaluation.plot import draw_frontier
from specdiff.evaluation.table import markdown
from specdiff.measure.machine import usable_device
from specdiff.measure.progress import progress_bar
from specdiff.measure.summary import environment
from specdiff.models.subject import STEPS, Subject, find_subject

CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
TABLE, PLOT = "table.md", "frontier.png"


@dataclass(frozen=True)
class Amounts:
    """How much is measured.

    Attributes:
        pictures: Pictures a method is compared on.
        pairs: Pairs of dense and method behind a time ratio.
        large_set: Pictures for the distance between sets and the probe; 0: neither.
    """

    pictures: int
    pairs: int
    large_set: int

    def __post_init__(self) -> None:
        if self.pairs > self.pictures:
            raise SpecdiffError(
                f"pairs={self.pairs}: must be at most the pictures, pictures={self.pictures}"
            )


AMOUNTS: Mapping[str, Amounts] = {"full": Amounts(32, 8, 256), "quick": Amounts(4, 2, 0)}


@dataclass(frozen=True)
class Wanted:
    """The options of `specdiff eval`; see its help."""

    model: str
    weights: Path | None
    device: str
    sizes: Amounts
    seed: int
    probe: Path | None
    out: Path
    methods: Sequence[str]
    plans: Sequence[Path]
    phases: Sequence[str]
    minutes: float | None
    clock: str


def _setup(wanted: Wanted, subject: Subject) -> Setup:
    count = max(wanted.sizes.pictures, wanted.sizes.large_set)
    return Setup(
        subject,
        usable_device(wanted.device),
        subject.requests(count, wanted.seed),
        wanted.sizes.pictures,
        wanted.sizes.pairs,
        Probe.load(wanted.probe) if wanted.probe else None,
        CLOCKS[wanted.clock],
    )


def _terms(wanted: Wanted) -> Terms:
    sizes = wanted.sizes
    return Terms(
        wanted.model,
        STEPS,
        sizes.pictures,
        sizes.pairs,
        sizes.large_set,
        wanted.seed,
        wanted.clock,
    )


def evaluate(wanted: Wanted, console: Console) -> int:
    """Measure what is not known yet behind a progress bar, and write the reports.

    Returns:
        How many of the wanted measurements are still left.

    Raises:
        SpecdiffError: An option has no such value, or the folder holds results under other terms.
    """
    phases = wanted.phases or PHASES
    if unknown := sorted(set(phases) - set(PHASES)):
        raise SpecdiffError(f"no phase {unknown[0]!r}: choose from {', '.join(PHASES)}")
    if wanted.clock not in CLOCKS:
        raise SpecdiffError(f"no clock {wanted.clock!r}: choose from {', '.join(CLOCKS)}")
    device = usable_device(wanted.device)
    subject = find_subject(wanted.model, wanted.weights, device)
    candidates = choose(all_candidates(subject, wanted.plans), wanted.methods)
    findings = Findings.open(wanted.out / RESULTS, _terms(wanted), environment(device))
    deadline = None if wanted.minutes is None else time.monotonic() + 60 * wanted.minutes
    campaign = Campaign(_setup(wanted, subject), findings, wanted.out, deadline)
    with progress_bar(console, len(campaign.left(candidates, phases))) as update:
        campaign.setup.tell = lambda line: update(description=line)
        for _ in campaign.run(candidates, phases):
            update(advance=1)
    write_reports(findings, wanted.out)
    return len(campaign.left(candidates, phases))


def write_reports(findings: Findings, folder: Path) -> None:
    """Write the table and the plot of what is known."""
    (folder / TABLE).write_text(markdown(findings), encoding="utf-8")
    draw_frontier(findings, folder / PLOT)
