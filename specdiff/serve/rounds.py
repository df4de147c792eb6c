"""Rounds: calls from many generations, evaluated by one thread, what fits in one call of the model.

A round begins when every generation that is between two steps has called, or after a short wait:
so generations go in step, and none waits for one that encodes a prompt or decodes a picture. Where
all are about to begin, the first waits for the others as long as a round takes: of generations that
begin together the same steps are computed, in one call.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import specdiff
from specdiff.runtime.streams.registry import Session
from specdiff.serve.joining import Call, joinable, joined, parted

PATIENCE = 0.05
"""Seconds that a call waits for others, at most; one that begins, if a round takes no longer."""
LONGEST = 1.0
"""Of that round: one that compiled says nothing of the next."""
MOST_ROWS = 8
"""Rows of one call of the model, at most, unless a single generation has more."""
Evaluate = Callable[[nn.Module, Sequence["Waiting"]], list[Any]]
"""Answers calls that can be made one, in their order."""


@dataclass(eq=False)
class Waiting:
    """A call, the session that it is made in, and where its output goes.

    Attributes:
        shares: Whether it may be made one with others.
        begins: Whether it is the first of its generation.
    """

    call: Call
    session: Session
    shares: bool = True
    begins: bool = False
    output: Future[Any] = field(default_factory=Future)


def one_by_one(model: nn.Module, waiting: Sequence[Waiting]) -> list[Any]:
    """Each call alone, in its session."""
    outputs = []
    for each in waiting:
        args, kwargs = joined([each.call])
        with each.session:
            outputs.append(model(*args, **kwargs))
    return outputs


def by_rows(model: nn.Module, waiting: Sequence[Waiting]) -> list[Any]:
    """All calls as one, of which each row follows its own plan; skipped rows leave the batch."""
    if not waiting[0].shares:
        return one_by_one(model, waiting)
    rows = [each.call.rows for each in waiting]
    args, kwargs = joined([each.call for each in waiting])
    sessions = [each.session for each in waiting for _ in range(each.call.rows)]
    with specdiff.rows(model, sessions):
        output = model(*args, **kwargs)
    return parted(output, rows)


class Rounds:
    """The thread that calls the model.

    Args:
        model: An attached one.
        evaluate: How calls that can be made one are answered.
        most: Generations in progress, at most.
    """

    def __init__(self, model: nn.Module, evaluate: Evaluate, most: int) -> None:
        self._model = model
        self._evaluate = evaluate
        self._most = most
        self._changed = threading.Condition()
        self._waiting: list[Waiting] = []
        self._ahead: set[object] = set()
        self._between: set[object] = set()
        self._latest = 0.0
        """Seconds that the latest round took."""
        self._closed = False
        self.calls = self.rows = self.failed_in_a_row = 0
        self._thread = threading.Thread(target=self._run, name="specdiff-rounds", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether calls are still answered."""
        return self._thread.is_alive()

    def put(self, waiting: Waiting) -> None:
        """Hand a call over to the next round."""
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._waiting.append(waiting)
            self._changed.notify_all()

    def announce(self, generation: object) -> None:
        """Say that a generation is to begin, once others have made room for it."""
        with self._changed:
            self._ahead.add(generation)

    def expect(self, generation: object, more: bool) -> None:
        """Say whether a generation is to call again: then a round waits for it a little."""
        with self._changed:
            self._ahead.discard(generation)
            (self._between.add if more else self._between.discard)(generation)
            self._changed.notify_all()

    def close(self) -> None:
        """Answer no more calls; those that wait are cancelled."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while self._round():
            pass
        for left in self._waiting:
            left.output.cancel()

    def _round(self) -> bool:
        """Answer what waits; nothing of it is kept until the next. False once it is closed."""
        waiting = self._next()
        began = time.monotonic()
        for group in grouped(waiting or ()):
            self._answer(group)
        self._latest = time.monotonic() - began
        return waiting is not None

    def _next(self) -> list[Waiting] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            began = time.monotonic()
            while not self._closed and (left := began + self._patience() - time.monotonic()) > 0:
                self._changed.wait(left)
            if self._closed:
                return None
            waiting, self._waiting = self._waiting, []
        # Of a generation that was cancelled nobody waits for the output.
        return [each for each in waiting if each.output.set_running_or_notify_cancel()]

    def _patience(self) -> float:
        """Seconds to wait for more calls, from the first on."""
        due = len(self._between)
        all_begin = all(each.begins for each in self._waiting)
        if all_begin:
            due = min(due + len(self._ahead), self._most)
        if len(self._waiting) >= due:
            return 0.0
        return max(PATIENCE, min(self._latest, LONGEST)) if all_begin else PATIENCE

    def _answer(self, group: Sequence[Waiting]) -> None:
        try:
            with torch.no_grad():
                outputs = self._evaluate(self._model, group)
        except Exception as error:
            if len(group) > 1:  # whose fault it is shows once each is alone
                for each in group:
                    self._answer([each])
                return
            self.failed_in_a_row += 1
            # Without its frames, which lead back here and would keep what the call held.
            group[0].output.set_exception(error.with_traceback(None))
            return
        self.failed_in_a_row = 0
        self.calls += 1
        self.rows += sum(each.call.rows for each in group)
        for each, output in zip(group, outputs, strict=True):
            each.output.set_result(output)


def grouped(waiting: Sequence[Waiting]) -> list[list[Waiting]]:
    """Calls that can be made one together, in the order in which they came."""
    groups: list[list[Waiting]] = []
    for each in waiting:
        fitting = (group for group in groups if _fits(each, group))
        group = next(fitting, None)
        if group is None:
            groups.append([each])
        else:
            group.append(each)
    return groups


def _fits(each: Waiting, group: Sequence[Waiting]) -> bool:
    rows = each.call.rows + sum(other.call.rows for other in group)
    shares = each.shares and group[0].shares and rows <= MOST_ROWS
    return shares and joinable(group[0].call, each.call)
