"""Measuring one method: its pictures against the dense ones, and its time beside theirs."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import specdiff
from specdiff import torch_adapter
from specdiff.comparison import Request
from specdiff.errors import SpecdiffError
from specdiff.evaluation.candidates import DENSE, Candidate, Prepared
from specdiff.evaluation.features import Probe, features, kernel_distance
from specdiff.evaluation.measures import (
    PeakMemory,
    flop_counter,
    flops_share,
    likeness,
    time_ratio,
)
from specdiff.evaluation.subject import STEPS, Subject

Values = dict[str, Any]
Tell = Callable[[str], None]
FEATURE_BATCH = 16
"""Pictures that pass through the feature network at once."""


@dataclass
class Bench:
    """What all methods are measured with.

    Attributes:
        subject: The pipeline.
        device: Where it runs.
        requests: The pictures, the large set included.
        pictures: How many of them each method is compared on.
        pairs: Pairs behind a time ratio.
        probe: Recognises the prompts; None: that is not measured.
        tell: Told what is going on.
    """

    subject: Subject
    device: torch.device
    requests: Sequence[Request]
    pictures: int
    pairs: int
    probe: Probe | None = None
    tell: Tell = lambda line: None

    def draw(self, prepared: Prepared, candidate: Candidate, count: int) -> list[Tensor]:
        """Latents of the first `count` requests."""
        found = []
        for index, request in enumerate(self.requests[:count]):
            self.tell(f"{candidate.name}: picture {index + 1} of {count}")
            found.append(self.subject.draw(prepared.pipeline, request, candidate.steps))
        return found


def _start(bench: Bench, candidate: Candidate) -> tuple[Prepared, float]:
    """Compile a fresh pipeline by drawing one picture; returns it and how long that took."""
    bench.tell(f"{candidate.name}: compiling")
    prepared = candidate.prepare(bench.subject.load())
    started = time.perf_counter()
    bench.subject.draw(prepared.pipeline, bench.requests[0], candidate.steps)
    return prepared, time.perf_counter() - started


def _no_recompile(candidate: Candidate, before: int) -> None:
    """Past a few variants torch runs eagerly in silence, so none is allowed while measuring.

    Raises:
        SpecdiffError: Something was compiled since `before`.
    """
    now = torch_adapter.graphs_compiled()
    if now != before:
        raise SpecdiffError(f"{candidate.name}: {now - before} graphs recompiled while measured")


def measure_quality(
    bench: Bench, candidate: Candidate, reference: Sequence[Tensor] | None
) -> tuple[Values, list[Tensor]]:
    """Draw the pictures and compare them with the dense ones.

    Args:
        bench: What to measure with.
        candidate: The method.
        reference: Latents of the dense pictures; None: this is the dense method.

    Returns:
        What was measured, and the latents drawn.

    Raises:
        SpecdiffError: A graph was recompiled, or one graph was promised and there are more.
    """
    torch_adapter.forget_compiled()
    memory = PeakMemory(bench.device)
    prepared, first_seconds = _start(bench, candidate)
    graphs = torch_adapter.graphs_compiled()
    if prepared.compiled == "graph" and graphs != 1:
        raise SpecdiffError(f"{candidate.name}: {graphs} graphs instead of one")
    memory.restart()
    count = len(bench.requests) if candidate.in_large_set else bench.pictures
    latents = bench.draw(prepared, candidate, count)
    peak = memory.bytes
    _no_recompile(candidate, graphs)
    values: Values = {
        "first_picture_s": round(first_seconds, 2),
        "graphs": graphs,
        "peak_bytes": peak,
        "flops_share": round(_flops_share(bench, candidate, prepared), 4),
        **_fallbacks(prepared),
        **_likeness(bench, latents, latents if reference is None else reference),
    }
    if count > bench.pictures:
        values |= _sets(bench, latents, latents if reference is None else reference)
    return values, latents


def _fallbacks(prepared: Prepared) -> Values:
    if prepared.usage is None:
        return {}
    usage = prepared.usage()
    return {
        "tokens_share": round(usage.tokens_computed / usage.tokens_total, 4),
        "cache_bytes": usage.cache_bytes,
        "fallbacks": dict(usage.fallbacks),
    }


def _likeness(bench: Bench, latents: Sequence[Tensor], reference: Sequence[Tensor]) -> Values:
    bench.tell("comparing")
    found = [
        likeness(bench.subject.picture(a), bench.subject.picture(b), a, b)
        for a, b in zip(latents[: bench.pictures], reference, strict=False)
    ]
    mean = statistics.fmean
    psnr = [one.psnr for one in found]
    return {
        # JSON knows no infinity: equal pictures have no PSNR.
        "psnr_db": _rounded(mean(psnr)),
        "psnr_db_lowest": _rounded(min(psnr)),
        "psnr_db_each": [_rounded(value) for value in psnr],
        "ssim": _rounded(mean(one.ssim for one in found)),
        "feature_distance": _rounded(mean(one.feature_distance for one in found)),
        "latent_error": _rounded(mean(one.latent_error for one in found)),
    }


def _rounded(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None


def _pooled(bench: Bench, latents: Sequence[Tensor]) -> Tensor:
    pictures = [bench.subject.to_pixels(one)[0] for one in latents]
    batches = [pictures[i : i + FEATURE_BATCH] for i in range(0, len(pictures), FEATURE_BATCH)]
    return torch.cat([features(torch.stack(batch)).pooled for batch in batches])


def _sets(bench: Bench, latents: Sequence[Tensor], reference: Sequence[Tensor]) -> Values:
    ours, theirs = _pooled(bench, latents), _pooled(bench, reference)
    values: Values = {"kernel_distance": _rounded(kernel_distance(ours, theirs))}
    if bench.probe is not None:
        prompts = [request.prompt for request in bench.requests]
        values["recognised"] = _rounded(bench.probe.recognised(ours, prompts))
    return values


@torch.no_grad()
def _flops_share(bench: Bench, candidate: Candidate, prepared: Prepared) -> float:
    """FLOPs of one picture over a dense one's."""
    bench.tell(f"{candidate.name}: counting FLOPs")
    request = bench.requests[0]
    if candidate.eager is None:
        assert prepared.usage is not None
        specdiff.reset(prepared.pipeline.transformer)
        bench.subject.draw(prepared.pipeline, request, candidate.steps)
        inputs = _inputs(bench.subject)
        report = specdiff.explain(prepared.pipeline.transformer, **inputs)
        return flops_share(report, prepared.usage(), STEPS)
    if candidate.family in ("dense", "fewer steps"):
        return candidate.steps / STEPS
    return _flops(bench, candidate.eager, STEPS) / (STEPS * _flops(bench, lambda p: p, 1))


def _flops(bench: Bench, change: Callable[[Any], Any], steps: int) -> int:
    pipeline = change(bench.subject.load())
    with flop_counter() as counter:
        bench.subject.draw(pipeline, bench.requests[0], steps)
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


def measure_time(bench: Bench, candidate: Candidate) -> Values:
    """Draw pictures in turn with the dense model and the method, in one process.

    Raises:
        SpecdiffError: A graph was recompiled on the way.
    """
    torch_adapter.forget_compiled()
    dense, _ = _start(bench, DENSE)
    prepared, _ = _start(bench, candidate)
    graphs = torch_adapter.graphs_compiled()
    seconds: dict[str, list[float]] = {"dense": [], "own": []}
    for index in range(bench.pairs):
        bench.tell(f"{candidate.name}: pair {index + 1} of {bench.pairs}")
        request = bench.requests[index % bench.pictures]
        for name, pipeline, steps in (
            ("dense", dense.pipeline, STEPS),
            ("own", prepared.pipeline, candidate.steps),
        ):
            started = time.perf_counter()
            bench.subject.draw(pipeline, request, steps)
            seconds[name].append(time.perf_counter() - started)
    _no_recompile(candidate, graphs)
    return {
        "speedup": round(time_ratio(seconds["dense"], seconds["own"]), 4),
        "seconds": round(statistics.median(seconds["own"]), 4),
        "seconds_each": [round(second, 4) for second in seconds["own"]],
        "dense_seconds_each": [round(second, 4) for second in seconds["dense"]],
    }
