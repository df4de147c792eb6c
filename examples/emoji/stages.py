"""The stages of the training and where a run stands in them."""

import statistics
from dataclasses import dataclass, field

from specdiff.demo import PATCH

STALL_FACTOR = 5.0
"""A step counts for at most this many median steps, so that a paused process loses no budget."""


@dataclass(frozen=True)
class Stage:
    """One part of the training.

    Attributes:
        side: Pixels a side.
        kept_side: The root of the number of tokens that a step sees.
        batch: Pictures in a step.
        rate: Scale of the learning rates.
        ema_decay: Decay of the averaged weights at each step.
    """

    side: int
    kept_side: int
    batch: int
    rate: float
    ema_decay: float

    @property
    def token_side(self) -> int:
        """Tokens a side of a whole picture."""
        return self.side // PATCH


STAGES = (
    Stage(32, 8, batch=64, rate=1.0, ema_decay=0.998),
    Stage(128, 16, batch=32, rate=1.0, ema_decay=0.998),
    Stage(128, 32, batch=8, rate=0.7, ema_decay=0.97),
)


@dataclass
class Progressed:
    """Where the training stands; saved with every checkpoint."""

    stage: int = 0
    step: int = 0
    stage_step: int = 0
    stage_seconds: float = 0.0
    pictures: int = 0
    losses: list[tuple[int, int, float]] = field(default_factory=list)
    """(step, stage, mean loss since the last entry)."""

    def advance(self, seconds: float, pictures: int) -> None:
        """Count one step."""
        self.step += 1
        self.stage_step += 1
        self.stage_seconds += seconds
        self.pictures += pictures


class Stopwatch:
    """Tells how many seconds of each step count as training time."""

    def __init__(self) -> None:
        self.durations: list[float] = []

    @property
    def typical(self) -> float:
        """Median duration of the last hundred steps, in seconds."""
        return statistics.median(self.durations[-100:])

    def count(self, seconds: float) -> float:
        """Return how much of a step counts: nothing of the first, which compiles."""
        self.durations.append(seconds)
        return min(seconds, STALL_FACTOR * self.typical) if len(self.durations) > 1 else 0.0
