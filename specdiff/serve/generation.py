"""Generation: one picture on its way, as the engine knows it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

from torch import nn

import specdiff
from specdiff.errors import OptionError
from specdiff.models.picture_model import Order
from specdiff.runtime.streams.registry import Session
from specdiff.serve.events import Event
from specdiff.serve.rounds import Rounds, Waiting

Tell = Callable[[Event], None]


class Cancelled(Exception):
    """Nobody waits for this generation any more."""


class Generation:
    """One picture being drawn; `tell` gets its events, from threads of the engine."""

    def __init__(self, order: Order, quality: str | None, tell: Tell) -> None:
        self.order = order
        self.quality = quality
        self.tell = tell
        self.began = time.monotonic()
        self.scheduler: Any = None
        """Of its pipeline, which it must not hold itself: that leads back here."""
        self.session: Session | None = None
        self.parts: set[str] = set()
        """Names of the calls in a step, where guidance makes two."""
        self.calls = 0
        self._cancelled = threading.Event()
        self._waiting: Waiting | None = None

    def cancel(self) -> None:
        """Stop it, before its next step at the latest."""
        self._cancelled.set()
        waiting = self._waiting
        if waiting is not None:
            waiting.output.cancel()

    def session_of(self, model: nn.Module, part: str) -> tuple[Session, bool]:
        """The session of a call, and whether the call may be made one with others.

        A row stands for one prompt throughout. Guidance in separate calls has two, and its latent
        moves by both: so these share a session in which values are read, and no batch.

        Args:
            model: The denoiser.
            part: Of guidance, which the call is.
        """
        is_new = part not in self.parts
        self.parts.add(part)
        shares = len(self.parts) == 1
        if self.session is None or (is_new and not shares):
            self.session = self._new_session(model, shares)
        return self.session, shares

    def _new_session(self, model: nn.Module, knows_times: bool) -> Session:
        options: dict[str, Any] = {"scheduler": self.scheduler}
        if self.quality is not None:
            options["quality"] = self.quality
        if knows_times:
            try:
                return specdiff.session(model, self.scheduler.timesteps, **options)
            except OptionError:  # times in no order: they are read at every call
                pass
        return specdiff.session(model, **options)

    @property
    def is_cancelled(self) -> bool:
        """Whether it was stopped."""
        return self._cancelled.is_set()

    def wait(self, waiting: Waiting, rounds: Rounds) -> Any:
        """The output of a call.

        Raises:
            Cancelled: The generation was stopped before the call began.
        """
        self._waiting = waiting
        if self.is_cancelled:
            raise Cancelled
        rounds.put(waiting)
        try:
            return waiting.output.result()
        except CancelledError:
            raise Cancelled from None
        finally:
            self._waiting = None


class Preparation:
    """What a pipeline does before its first step, one pipeline at a time."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._has_ended = True

    def __enter__(self) -> Preparation:
        self._lock.acquire()
        self._has_ended = False
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Let the next pipeline begin."""
        if not self._has_ended:
            self._has_ended = True
            self._lock.release()
