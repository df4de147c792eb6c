"""Measuring one method: its pictures against the dense ones, and its time beside theirs."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import specdiff
from specdiff import torch_adapter
from specdiff.errors import SpecdiffError
from specdiff.evaluation.features import Probe, features, kernel_distance
from specdiff.evaluation.findings import (
    EACH,
    FEATURES,
    FLOPS,
    LOWEST,
    PSNR,
    SOLUTION,
    SPEEDUP,
    WORST,
)
from specdiff.evaluation.measures import (
    PeakMemory,
    closeness,
    flop_counter,
    flops_share,
    time_ratio,
)
from specdiff.evaluation.method import DENSE, Candidate, Prepared, Refused
from specdiff.measure.comparison import psnr, worst_tenth
from specdiff.measure.timing import in_turns, timed
from specdiff.models.subject import STEPS, Request, Subject

Values = dict[str, Any]
TellLine = Callable[[str], None]
FEATURE_BATCH = 16
"""Pictures that pass through the feature network at once."""
LETTERS_OF_A_REASON = 300
"""Of an error of a peer, that the table keeps."""


@dataclass
class Setup:
    """What all methods are measured with.

    Attributes:
        subject: The pipeline.
        device: Where it runs.
        requests: The pictures, the large set included.
        pictures: How many of them each method is compared on.
        pairs: How many of those are drawn in turn with the dense model, for the time ratio.
        clock: Tells seconds: of the wall, or of this process's processors where others are busy.
        probe: Recognises the prompts; None: that is not measured.
        tell: Told what is going on.
    """

    subject: Subject
    device: torch.device
    requests: Sequence[Request]
    pictures: int
    pairs: int
    probe: Probe | None = None
    clock: Callable[[], float] = time.perf_counter
    tell: TellLine = lambda line: None


@contextlib.contextmanager
def _theirs(candidate: Candidate) -> Iterator[None]:
    """In here a peer is at work: what fails is its refusal. All else that fails is ours."""
    try:
        yield
    except Exception as error:
        if not candidate.is_peer:
            raise
        raise Refused(_reason(error)) from error


def _reason(error: Exception) -> str:
    """One line of an error that a reader of the table understands."""
    text = " ".join(str(error).split())[:LETTERS_OF_A_REASON]
    return text if isinstance(error, SpecdiffError) else f"{type(error).__name__}: {text}"


def _start(setup: Setup, candidate: Candidate, steps: int) -> tuple[Prepared, float]:
    """Compile a fresh pipeline by drawing one picture; returns it and how long that took."""
    setup.tell(f"{candidate.name}: compiling")
    pipeline, request = setup.subject.load(), setup.requests[0]
    setup.subject.embed(setup.requests)
    with _theirs(candidate):
        prepared = candidate.prepare(pipeline)
        _, seconds = timed(lambda: setup.subject.draw(prepared.pipeline, request, steps))
    return prepared, seconds


def _require_graphs(candidate: Candidate, prepared: Prepared, graphs: int) -> None:
    """Past a few variants torch runs eagerly in silence, so nothing may compile while measured.

    Raises:
        Refused: Something did, or one graph was promised and there are more.
    """
    now = torch_adapter.graphs_compiled()
    if prepared.compiled == "graph" and graphs != 1:
        raise Refused(f"{candidate.name}: {graphs} graphs instead of one")
    if now != graphs:
        raise Refused(f"{candidate.name}: {now - graphs} graphs compiled while measured")


def draw_pictures(setup: Setup, candidate: Candidate) -> tuple[Values, list[Tensor]]:
    """Draw the pictures of a method, those of the large set too if it takes part in it.

    Returns:
        What was counted on the way, and the latents.

    Raises:
        Refused: A peer fails, something compiled on the way, or in more graphs than promised.
    """
    torch_adapter.forget_compiled()
    memory = PeakMemory(setup.device)
    prepared, first_seconds = _start(setup, candidate, candidate.steps)
    graphs = torch_adapter.graphs_compiled()
    count = len(setup.requests) if candidate.in_large_set else setup.pictures
    memory.restart()
    latents = _draw(setup, candidate, prepared, range(count))
    peak = memory.bytes
    _require_graphs(candidate, prepared, graphs)
    values: Values = {
        "first_picture_seconds": round(first_seconds, 2),
        "graphs": graphs,
        "peak_bytes": peak,
        **_counters(prepared),
    }
    return values, latents


def compare_pictures(
    setup: Setup, latents: Sequence[Tensor], reference: Sequence[Tensor]
) -> Values:
    """How far pictures are from the dense ones, one by one, and as sets where both are large."""
    setup.tell("comparing")
    values = _closeness(setup, latents, reference)
    if min(len(latents), len(reference)) > setup.pictures:
        values |= _sets(setup, latents, reference)
    return values


def compare_solutions(
    setup: Setup, latents: Sequence[Tensor], solutions: Sequence[Tensor]
) -> Values:
    """How far pictures are from where the sampling equation leads."""
    setup.tell("comparing with the solution")
    each = [
        psnr(setup.subject.picture(a), setup.subject.picture(b))
        for a, b in zip(latents[: setup.pictures], solutions, strict=False)
    ]
    return _psnr_values(SOLUTION, each)


def _psnr_values(name: str, each: Sequence[float]) -> Values:
    # JSON knows no infinity: equal pictures have no PSNR.
    return {
        name: _rounded(statistics.fmean(each)),
        f"{name}{WORST}": _rounded(worst_tenth(each)),
        f"{name}{LOWEST}": _rounded(min(each)),
        f"{name}{EACH}": [_rounded(value) for value in each],
    }


def time_pictures(setup: Setup, candidate: Candidate) -> Values:
    """Draw pictures in turn with the dense model, compiled in the same process, and time them.

    Raises:
        Refused: A peer fails, something compiled on the way, or in more graphs than promised.
    """
    torch_adapter.forget_compiled()
    prepared = _start(setup, candidate, candidate.steps)[0]
    _require_graphs(candidate, prepared, torch_adapter.graphs_compiled())
    shares_dense = candidate.prepare is DENSE.prepare
    dense = prepared if shares_dense else _start(setup, DENSE, steps=2)[0]
    graphs = torch_adapter.graphs_compiled()
    turns = in_turns(
        ((DENSE, dense), (candidate, prepared)),
        range(setup.pairs),
        lambda one, index: _draw(setup, *one, range(index, index + 1)),
        clock=setup.clock,
    )
    times = [spent for *_, spent in turns]
    if torch_adapter.graphs_compiled() != graphs:
        raise Refused(f"{candidate.name}: a graph compiled while measured")
    dense_seconds, seconds = times[::2], times[1::2]
    return {
        SPEEDUP: round(time_ratio(dense_seconds, seconds), 4),
        "seconds": round(statistics.median(seconds), 4),
        "seconds_each": [round(second, 4) for second in seconds],
        "dense_seconds_each": [round(second, 4) for second in dense_seconds],
    }


def _draw(setup: Setup, candidate: Candidate, prepared: Prepared, indices: range) -> list[Tensor]:
    """Latents of some of the requests."""
    latents = []
    for index in indices:
        setup.tell(f"{candidate.name}: picture {index + 1} of {indices.stop}")
        request = setup.requests[index]
        with _theirs(candidate):
            latents.append(setup.subject.draw(prepared.pipeline, request, candidate.steps))
    return latents


def _counters(prepared: Prepared) -> Values:
    if prepared.usage is None:
        return {}
    usage = prepared.usage()
    return {
        "tokens_share": round(usage.tokens_computed / usage.tokens_total, 4),
        "cache_bytes": usage.cache_bytes,
        "fallbacks": dict(usage.fallbacks),
    }


def _closeness(setup: Setup, latents: Sequence[Tensor], reference: Sequence[Tensor]) -> Values:
    setup.tell("comparing")
    each = [
        closeness(setup.subject.picture(a), setup.subject.picture(b), a, b, setup.device)
        for a, b in zip(latents[: setup.pictures], reference, strict=False)
    ]
    mean = statistics.fmean
    return {
        **_psnr_values(PSNR, [one.psnr for one in each]),
        "ssim": _rounded(mean(one.ssim for one in each)),
        FEATURES: _rounded(mean(one.feature_distance for one in each)),
        "latent_error": _rounded(mean(one.latent_error for one in each)),
    }


def _rounded(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None


def _pooled(setup: Setup, latents: Sequence[Tensor]) -> Tensor:
    pictures = [setup.subject.to_pixels(one)[0] for one in latents]
    batches = [pictures[i : i + FEATURE_BATCH] for i in range(0, len(pictures), FEATURE_BATCH)]
    seen = [features(torch.stack(batch).to(setup.device)).pooled for batch in batches]
    return torch.cat(seen).cpu()


def _sets(setup: Setup, latents: Sequence[Tensor], reference: Sequence[Tensor]) -> Values:
    ours, theirs = _pooled(setup, latents), _pooled(setup, reference)
    values: Values = {"kernel_distance": _rounded(kernel_distance(ours, theirs))}
    if setup.probe is not None:
        prompts = [request.prompt for request in setup.requests]
        values["recognised"] = _rounded(setup.probe.recognised(ours, prompts))
    return values


@torch.no_grad()
def measure_flops(setup: Setup, candidate: Candidate) -> Values:
    """FLOPs of one picture over a dense one's; nothing is compiled by Inductor."""
    setup.tell(f"{candidate.name}: counting FLOPs")
    if candidate.eager is not None:
        spent = _flops(setup, candidate, candidate.steps)
        return {FLOPS: round(spent / (STEPS * _flops(setup, DENSE, 1)), 4)}
    torch_adapter.forget_compiled()
    options = {**candidate.settings, "inner_backend": "eager"}
    pipeline = setup.subject.load()
    compiled: Any = torch.compile(pipeline.transformer, backend="specdiff", options=options)
    pipeline.transformer = compiled
    setup.subject.draw(pipeline, setup.requests[0], candidate.steps)
    report = specdiff.explain(compiled, **_inputs(setup.subject))
    return {FLOPS: round(flops_share(report.step_flops, specdiff.stats(compiled), STEPS), 4)}


def _flops(setup: Setup, candidate: Candidate, steps: int) -> int:
    assert candidate.eager is not None
    pipeline, request = setup.subject.load(), setup.requests[0]
    with _theirs(candidate):
        pipeline = candidate.eager(pipeline)
        with flop_counter() as counter:
            setup.subject.draw(pipeline, request, steps)
    return int(counter.get_total_flops())


def _inputs(subject: Subject) -> Mapping[str, Any]:
    """The transformer's arguments in the pipeline's first step."""
    pipeline = subject.load()
    seen: dict[str, Any] = {}

    class Seen(Exception):
        """The arguments are known: no need to run."""

    def note(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        seen.update(kwargs)
        raise Seen

    pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
    with contextlib.suppress(Seen):
        subject.draw(pipeline, subject.requests(1, 0)[0], 1)
    return seen
