"""Recording: what every evaluation of a model did. Tensors are kept, and read only when asked."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
Kind = Literal["dense", "selective", "skipped", "fallback"]

COMPUTED, REUSED, FORECAST = 1, 2, 3
"""The paper's classes C1, C2 and C3."""


class Clock:
    """Seconds of some work on a device, which is not waited for until they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.Event, torch.Event] | None = None
        if device.type != "cpu":
            start, stop = (torch.Event(device=device, enable_timing=True) for _ in range(2))
            self._events = start, stop
            start.record()
        self._start = self._stop = time.perf_counter()

    def stop(self) -> None:
        """The work was handed over."""
        if self._events is not None:
            self._events[1].record()
        self._stop = time.perf_counter()

    @property
    def seconds(self) -> float:
        """From start to stop, on the device."""
        if self._events is None:
            return self._stop - self._start
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1e3


@dataclass(frozen=True)
class Spread:
    """How values are spread over tokens."""

    lowest: float
    median: float
    highest: float

    @classmethod
    def of(cls, values: Tensor) -> Spread:
        """That of all values of a tensor."""
        quantiles = torch.tensor([0, 0.5, 1], device=values.device)
        return cls(*values.float().flatten().quantile(quantiles).tolist())


@dataclass(eq=False)
class StepRecord:
    """One evaluation. What is said of B samples and N tokens holds for image tokens."""

    clock: Clock
    keeps_latent: bool = False
    """Whether `latent` was asked for."""
    batch: int = 0
    tokens: int = 0
    """N; 0 where a graph has no tokens that could be left out."""
    kind: Kind = "fallback"
    reason: str = ""
    """Why it was of this kind: of the schedule, or which guard failed."""
    generation: int | None = None
    """Counts the trajectories of a graph; None where a fallback belongs to none."""
    index: int | None = None
    """Counts the evaluations of a generation."""
    time: float | None = None
    """As the model or the session has it."""
    told: bool = False
    """Whether a session or a scheduler gave the times of the run."""
    speculative: int = 0
    """Evaluations that looked ahead; their time is in `seconds`."""
    active: Tensor | None = None
    """int64 [B, K]: the tokens that were computed, of a selective step."""
    reused: Tensor | None = None
    """bool [B, N]: class C2, where the method has it."""
    scores: Tensor | None = None
    """float32 [B, N]: logarithms of the scores that chose the active tokens."""
    latent: Tensor | None = None
    """What was denoised, a copy, where it was asked for."""
    importance: Tensor | None = None
    """float32 [B, N]: attention received, 1 on average, where it was measured: in dense and
    selective steps of a plan that selects tokens."""

    @property
    def seconds(self) -> float:
        """Time on the device, look-ahead and compiling included."""
        return self.clock.seconds

    @property
    def active_share(self) -> float:
        """Computed tokens of all."""
        if self.kind == "skipped":
            return 0.0
        return 1.0 if self.active is None else self.active.shape[1] / self.tokens

    def classes(self) -> Tensor:
        """int8 [B, N] on the CPU: 1 where a token was computed, 2 reused, 3 forecast."""
        everywhere = FORECAST if self.kind in ("selective", "skipped") else COMPUTED
        picks = torch.full((self.batch, self.tokens), everywhere, dtype=torch.int8)
        if self.reused is not None:
            picks[self.reused.cpu()] = REUSED
        return picks if self.active is None else picks.scatter(1, self.active.cpu(), COMPUTED)

    def held_by_active(self) -> float | None:
        """Share of the total score that the computed tokens hold; None if none were chosen."""
        if self.scores is None or self.active is None:
            return None
        shares = self.scores.softmax(1)
        return float(shares.gather(1, self.active).sum(1).mean())

    def to_json(self) -> dict[str, Any]:
        """Plain values; reads the device."""
        spreads = {"log_score": self.scores, "importance": self.importance}
        return {
            "generation": self.generation,
            "index": self.index,
            "time": self.time,
            "kind": self.kind,
            "reason": self.reason,
            "active_share": self.active_share,
            "speculative": self.speculative,
            "seconds": self.seconds,
            "score_held_by_active": self.held_by_active(),
            **{k: None if v is None else vars(Spread.of(v)) for k, v in spreads.items()},
        }


@dataclass(eq=False)
class Recording:
    """What a model did while this context was entered. Made by `specdiff.record`.

    with specdiff.record(compiled) as recording:
        image = pipe("a red apple").images[0]
    print(recording)
    """

    recordings: list[Recording] = field(repr=False)
    """Those of the model that are being made."""
    steps: list[StepRecord] = field(default_factory=list)
    latents: bool = False
    """Whether to keep what was denoised."""

    def __enter__(self) -> Recording:
        self.recordings.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.recordings.remove(self)

    def generations(self) -> list[list[StepRecord]]:
        """The steps of each trajectory; fallbacks that belong to none are left out."""
        runs: dict[int, list[StepRecord]] = {}
        for step in self.steps:
            if step.generation is not None:
                runs.setdefault(step.generation, []).append(step)
        return list(runs.values())

    def to_json(self) -> list[dict[str, Any]]:
        """Plain values, one item a step; reads the device."""
        return [step.to_json() for step in self.steps]

    def __str__(self) -> str:
        """One line a step."""
        lines = []
        for step in self.steps:
            place = "-" if step.index is None else f"{step.generation}:{step.index}"
            when = "" if step.time is None else f" time {step.time:.4g}"
            ahead = f", {step.speculative} looked ahead" if step.speculative else ""
            lines.append(
                f"{place:>6}{when:12} {step.kind:9} {step.active_share:4.0%}"
                f" {step.seconds * 1e3:8.1f} ms  {step.reason}{ahead}"
            )
        return "\n".join(lines)


def begun(recordings: list[Recording], device: torch.device) -> StepRecord | None:
    """The record of an evaluation that begins, if anybody wants it."""
    if not recordings:
        return None
    return StepRecord(Clock(device), any(each.latents for each in recordings))


def ended(recordings: list[Recording], record: StepRecord | None) -> None:
    """The evaluation has ended, and its record is filled in."""
    if record is not None:
        record.clock.stop()
        for recording in recordings:
            recording.steps.append(record)


def recorded(
    recordings: list[Recording],
    device: torch.device,
    answer: Callable[[StepRecord | None], Result],
) -> Result:
    """What `answer` returns; it fills in the record of this evaluation if anybody wants it."""
    record = begun(recordings, device)
    result = answer(record)
    ended(recordings, record)
    return result
