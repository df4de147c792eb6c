"""Events: what a generation tells whoever waits for it, in plain values that travel."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from specdiff.models.picture_model import Order

Reason = Literal["refused", "full", "late", "lost", "broken"]
"""Why there is no picture: the order is wrong; too many wait; the deadline has passed; the replica
died; or the model failed."""


@dataclass(frozen=True)
class Counts:
    """What one engine has done since it began, and what it holds.

    Attributes:
        engine: Which one, by a name of its own.
        steps: Evaluations by kind: dense, selective, skipped.
        fallbacks: Dense evaluations that no plan asked for, by reason.
        calls: Calls of the model.
        rows: Rows of these calls, over all of them.
        cache_bytes: Held by caches and kept for forecasts, as `--max-cache-bytes` counts it.
        running: Generations in progress.
        waiting: Generations that have not begun.
    """

    engine: str
    steps: Mapping[str, int]
    fallbacks: Mapping[str, int]
    calls: int
    rows: int
    cache_bytes: int
    running: int
    waiting: int


@dataclass(frozen=True)
class Progress:
    """So many steps of a generation are done."""

    step: int
    steps: int


@dataclass(frozen=True)
class Picture:
    """The end of a generation: a PNG, the seconds since it was asked for, the engine's counts."""

    png: bytes
    seconds: float
    counts: Counts


@dataclass(frozen=True)
class Failure:
    """The other end: no picture, and why.

    Attributes:
        reason: The kind of reason.
        message: For the client.
        field: The field of the request that is wrong, if one is.
        retry_after: Seconds after which another try may succeed.
    """

    reason: Reason
    message: str
    field: str | None = None
    retry_after: int | None = None


Event = Progress | Picture | Failure


@dataclass(frozen=True)
class Card:
    """What clients may know of the model that is served; sides in pixels."""

    name: str
    side: int
    sides: tuple[int, int]
    grid: int
    steps: int
    quality: str
    prompts: tuple[str, ...]
    any_prompt: bool


class Backend(Protocol):
    """Who draws: an engine in this process, or replicas elsewhere."""

    def events(
        self, order: Order, quality: str | None, seconds: float
    ) -> AsyncGenerator[Event, None]:
        """The events of one generation; the last is a picture or a failure.

        Closing the iterator stops the generation. `quality` None is the server's own. After
        `seconds` it fails as "late".
        """

    async def card(self) -> Card:
        """What is served."""

    def counts(self) -> list[Counts]:
        """The latest counts of every engine that is known."""

    async def why_not_ready(self) -> str:
        """Why no picture can be drawn now; empty if one can."""
