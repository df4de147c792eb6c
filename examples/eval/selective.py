"""Selective steps with other scores, and with cached keys and values that drift on.

    python examples/eval/selective.py --model textures --pictures 3

The runtime's own plan at a cache ratio, programs run eagerly; every trial computes equally many
tokens. Draws what `specdiff tune` may draw, and prints the mean PSNR to the dense pictures. Scores
are put in place of the runtime's, drift around its programs: for trials, nothing that ships.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdiff.comparison import psnr
from specdiff.evaluation.cli import WEIGHTS
from specdiff.evaluation.subject import find_subject
from specdiff.plan import Plan
from specdiff.program import Evaluation, Programs
from specdiff.runtime.step.dispatch import Runtime
from specdiff.runtime.tokens.history import History
from specdiff.runtime.tokens.importance import SCORERS

STARVATION = 0.1
"""RAS's weight of how often a token was left out."""


def staleness(history: History, time: float) -> Tensor:
    """Logarithm of the square of how long ago each token was computed."""
    distance = (history.computed[0].times - time).abs()
    return 2 * (distance + 1e-6 * (1 + history.age)).log()


def deviation(history: History) -> Tensor:
    """Logarithm of each token's standard deviation of the latest prediction, alike in all rows."""
    spread = history.steps[0].tokens.float().std(-1).clamp_min(1e-12)
    return spread.mean(0, keepdim=True).expand_as(spread).log()


Scored = Callable[[Tensor, History, float], Tensor]
SCORES: dict[str, Scored] = {
    "attention": lambda his, history, time: his + staleness(history, time),
    "staleness": lambda his, history, time: staleness(history, time),
    "low deviation": lambda his, history, time: staleness(history, time) - deviation(history),
    "high deviation": lambda his, history, time: staleness(history, time) + deviation(history),
    "attention, high": lambda his, history, time: (
        his + staleness(history, time) + deviation(history)
    ),
    "attention, low": lambda his, history, time: (
        his + staleness(history, time) - deviation(history)
    ),
    "RAS": lambda his, history, time: STARVATION * history.cached - deviation(history),
    "RAS, high first": lambda his, history, time: STARVATION * history.cached + deviation(history),
}


class Drifting:
    """Programs whose selective runs find cached rows moved on along the line of their last two."""

    def __init__(self, programs: Programs, strength: float, reach: float = 1.0) -> None:
        self.programs, self.strength, self.reach = programs, strength, reach
        self._newest: list[Tensor] = []
        self._older: list[Tensor] = []
        self._times: list[tuple[Tensor, Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.programs, name)

    def dense(self, inputs: Sequence[object], caches: Sequence[Tensor]) -> Evaluation:
        """As usual, noting what it leaves."""
        found = self.programs.dense(inputs, caches)
        if len({cache.data_ptr() for cache in caches}) == len(caches):
            self._note([torch.ones(c.shape[:2], dtype=torch.bool) for c in caches], inputs, caches)
        return found

    def selective(
        self,
        inputs: Sequence[object],
        caches: Sequence[Tensor],
        active: Tensor,
        text: bool = True,
        importance: bool = True,
    ) -> Evaluation:
        """On drifted caches, which only the rows that it computes leave for good."""
        time = self._time(inputs)
        for index, cache in enumerate(caches):
            newest, older = self._newest[index], self._older[index]
            last, before = self._times[index]
            span = last - before
            ahead = (time - last).abs().minimum(self.reach * span.abs())
            share = torch.where(span != 0, ahead / span.abs().clamp_min(1e-12), 0.0)
            share = self.strength * share.reshape(*share.shape, *[1] * (cache.dim() - 2))
            cache.copy_(newest + share * (newest - older))
        given = [cache.clone() for cache in caches]
        found = self.programs.selective(inputs, caches, active, text, importance)
        pairs = zip(caches, given, strict=True)
        self._note([(c != g).reshape(*c.shape[:2], -1).any(2) for c, g in pairs], inputs, caches)
        return found

    def _time(self, inputs: Sequence[object]) -> float:
        index = self.programs.signature.time
        assert index is not None
        return torch.as_tensor(inputs[index]).flatten()[0].item()

    def _note(
        self, fresh: Sequence[Tensor], inputs: Sequence[object], caches: Sequence[Tensor]
    ) -> None:
        """Keep the last two values of every row, and when they were computed."""
        time = self._time(inputs)
        if not self._newest or time > self._times[0][0].max():  # times fall: a new generation
            self._newest = [cache.clone() for cache in caches]
            self._older = [cache.clone() for cache in caches]
            zeros = [torch.full(cache.shape[:2], time) for cache in caches]
            self._times = [(zero, zero) for zero in zeros]
            return
        for index, (rows, cache) in enumerate(zip(fresh, caches, strict=True)):
            wide = rows.reshape(*rows.shape, *[1] * (cache.dim() - 2))
            last, before = self._times[index]
            self._older[index] = torch.where(wide, self._newest[index], self._older[index])
            self._newest[index] = torch.where(wide, cache, self._newest[index])
            now = torch.full_like(last, time)
            self._times[index] = torch.where(rows, now, last), torch.where(rows, last, before)


def trials() -> list[tuple[str, str, float]]:
    """Name, score and strength of the drift of each."""
    scored = [(name, name, 0.0) for name in SCORES]
    return scored + [(f"attention, drift {s}", "attention", s) for s in (0.25, 0.5, 1.0)]


@torch.no_grad()
def main() -> None:
    """Draw every picture by every trial."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--pictures", type=int, default=3)
    parser.add_argument("--cache-ratio", type=float, default=0.75)
    parser.add_argument("--only", nargs="+", help="names of trials, as they are printed")
    wanted = parser.parse_args()
    subject = find_subject(wanted.model, wanted.weights, torch.device("cpu"))
    pipeline, requests = subject.load(), subject.tuning_requests(wanted.pictures)
    references = [subject.picture(subject.draw(pipeline, request)) for request in requests]
    options = {"plan": Plan.tapered(4), "cache_ratio": wanted.cache_ratio, "inner_backend": "eager"}
    options |= subject.options
    untouched, answer, kept = pipeline.transformer, Runtime.__call__, SCORERS["history"]
    for name, scored, strength in trials():
        if wanted.only and name not in wanted.only:
            continue

        def score(
            his: Tensor, fut: Tensor, history: History, time: float, starvation: float,
            scored: str = scored,
        ) -> Tensor:  # fmt: skip
            return SCORES[scored](his + fut, history, time)

        def drifting(self: Runtime, *inputs: object, strength: float = strength) -> list[Tensor]:
            if strength and not isinstance(self.programs, Drifting):
                self.programs = Drifting(self.programs, strength)
            return answer(self, *inputs)

        SCORERS["history"] = score
        Runtime.__call__ = drifting  # type: ignore[method-assign]
        torch._dynamo.reset()
        pipeline.transformer = torch.compile(untouched, backend="specdiff", options=options)
        found = [subject.picture(subject.draw(pipeline, request)) for request in requests]
        decibels = [psnr(mine, right) for mine, right in zip(found, references, strict=True)]
        each = ", ".join(f"{value:.1f}" for value in decibels)
        print(f"{name}: {statistics.fmean(decibels):.2f} dB ({each})", flush=True)
    SCORERS["history"], Runtime.__call__ = kept, answer  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
