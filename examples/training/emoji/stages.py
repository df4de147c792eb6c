"""The stages of the training."""

from dataclasses import dataclass

from training import Stage

from specdiff.models.demo import PATCH


@dataclass(frozen=True, kw_only=True)
class EmojiStage(Stage):
    """One part of the training.

    Attributes:
        side: Pixels a side.
        kept_side: The root of the number of tokens that a step sees.
    """

    side: int
    kept_side: int

    @property
    def token_side(self) -> int:
        """Tokens a side of a whole picture."""
        return self.side // PATCH


STAGES = (
    EmojiStage(side=32, kept_side=8, batch=64, rate=1.0, ema_decay=0.998),
    EmojiStage(side=128, kept_side=16, batch=32, rate=1.0, ema_decay=0.998),
    EmojiStage(side=128, kept_side=32, batch=8, rate=0.7, ema_decay=0.97),
)
