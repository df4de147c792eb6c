"""Rules: which evaluations are dense, of a generation of any number of steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from specdiff.errors import OptionError

TAPER = 16
"""Evaluations over which a tapered rule grows the distance of dense ones by `widest`."""
LATE = 2.6
"""Evaluations to the end below which a tapered rule is dense: the last two, if a guess is right."""
WORDS = ("tapered", "every", "warmup")


@dataclass(frozen=True)
class Rule:
    """Dense evaluations by a rule; those between them are gaps.

        Rule(warmup=3)                          D D D - - - - - - - - -
        Rule(widest=4)                          D - - - D - - - D - - -
        Rule(widest=4, tapered=True)            D - D - D - - D - - D D

    Raises `OptionError` for a field that is wrong.
    """

    warmup: int = 1
    """Dense evaluations at the start, at least 1."""
    widest: int = 0
    """Evaluations from a dense one to the next, where they are furthest apart; 0: none follow."""
    tapered: bool = False
    """Whether dense ones are close together at first, as errors made early grow, and the last two
    are dense, as nothing follows that could make their errors good."""

    def __post_init__(self) -> None:
        _check("plan: warmup", self.warmup, 1)
        _check(f"plan: {'tapered' if self.tapered else 'every'}", self.widest, int(self.tapered))

    @property
    def has_gaps(self) -> bool:
        """Whether any evaluation is not dense."""
        return self.widest != 1

    def why_dense(self, index: int, left: float) -> str:
        """Why an evaluation is dense; empty in a gap.

        Args:
            index: of the evaluation, from 0.
            left: evaluations left, this one included, as far as is known.
        """
        if index < self.warmup:
            return "warm-up"
        if index == self._latest(index):
            return f"dense {'at most ' if self.tapered else ''}every {self.widest}"
        return "near the end" if self.tapered and left < LATE else ""

    def to_json(self) -> dict[str, int]:
        """As `from_json` reads it: {"tapered": 4}, {"every": 4, "warmup": 3} or {"warmup": 3}."""
        kind = {"tapered" if self.tapered else "every": self.widest} if self.widest else {}
        return kind if kind and self.warmup == 1 else {**kind, "warmup": self.warmup}

    @classmethod
    def from_json(cls, written: object, where: str) -> Rule:
        """A rule from what `to_json` makes of one.

        Raises:
            OptionError: It is something else; names `where`.
        """
        values = written if isinstance(written, Mapping) else {}
        if not values or set(values) - set(WORDS) or {"tapered", "every"} <= set(values):
            raise OptionError(
                f'{where}={written!r}: must be {{"tapered": 4}} or {{"every": 4}}, with or without'
                ' "warmup", or {"warmup": 3}'
            )
        for name, value in values.items():
            _check(f"{where}.{name}", value, 1)
        widest = values.get("tapered", values.get("every", 0))
        return cls(values.get("warmup", 1), widest, "tapered" in values)

    def _latest(self, index: int) -> int:
        """The latest evaluation up to this one that the distances make dense."""
        latest = self.warmup - 1
        while self.widest and (due := latest + self._distance(latest)) <= index:
            latest = due
        return latest

    def _distance(self, latest: int) -> int:
        """From a dense evaluation to the next."""
        if not self.tapered:
            return self.widest
        return min(self.widest, 2 + latest * self.widest // TAPER)


def _check(where: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise OptionError(f"{where}={value!r}: must be an integer of at least {least}")
