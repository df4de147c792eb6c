"""Plans: the one language of the schedule. What each evaluation of a generation computes.

A plan is a rule that fits any number of steps, or a list with an entry for each evaluation. As a
small JSON file:

    {"specdiff_plan": 1, "rule": {"tapered": 4}, "settings": {"cache_ratio": 0.9}}

    {
      "specdiff_plan": 1,
      "evaluations": ["dense", "skip", 0.9, "dense"],
      "lookahead": 2,
      "settings": {"forecast": "linear"},
      "notes": {"psnr_db": 44.1}
    }

An evaluation is "dense", "skip", or the cache ratio of a selective one. "skip" is a gap, as is
whatever a rule does not make dense: gaps are forecast whole, or selective steps of the option
`cache_ratio`. `settings` are options; those that are given beside the plan outrank them. `notes`
are for the reader.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specdiff.errors import OptionError
from specdiff.rule import Rule

FORMAT = 1
"""Number of the file's layout, under the key `KEY`."""
KEY = "specdiff_plan"
DENSE, SKIP = "dense", "skip"
FIELDS = (KEY, "evaluations", "rule", "lookahead", "settings", "notes")
LOOKAHEAD = 2


@dataclass(frozen=True)
class Plan:
    """What each evaluation of a generation computes: by `ratios`, or else by `rule`.

    Made by `tapered`, `every`, `warmup`, `of`, `load`, or from `ratios`. Raises `OptionError` for
    a field that is wrong; `Options` checks what is in `settings`.
    """

    ratios: tuple[float, ...] = ()
    """Share of image tokens that each evaluation does not compute: 0 dense, 1 skipped. Empty where
    there is a rule."""
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Options that it was made with, by name."""
    notes: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)
    """What a reader may want to know, such as what it was measured to keep."""
    rule: Rule | None = None
    """Which evaluations are dense; the others are gaps."""
    lookahead: int = LOOKAHEAD
    """Evaluations of the paper's self-speculation, for plans that select tokens. The first is the
    first real step, so it costs `lookahead - 1` evaluations a generation; 0 or 1: none."""

    def __post_init__(self) -> None:
        if self.rule is None:
            object.__setattr__(self, "ratios", _ratios(self.ratios, "plan: ratios"))
        elif self.ratios:
            raise OptionError("plan: give ratios or a rule, not both")
        for name in ("settings", "notes"):
            _check_object(getattr(self, name), f"plan: {name}")
        _check_count(self.lookahead, "plan: lookahead")

    @classmethod
    def tapered(
        cls, widest: int = 4, *, warmup: int = 1, lookahead: int = LOOKAHEAD, **settings: Any
    ) -> Plan:
        """Dense evaluations close together at first, then further apart; the last two are dense.

        Args:
            widest: evaluations from a dense one to the next, at most. Higher is faster and further
                from the dense picture.
            warmup: dense evaluations at the start.
            lookahead: evaluations of self-speculation.
            settings: options that the plan holds.
        """
        return cls((), settings, rule=Rule(warmup, widest, True), lookahead=lookahead)

    @classmethod
    def every(cls, n: int, *, warmup: int = 1, lookahead: int = LOOKAHEAD, **settings: Any) -> Plan:
        """Every n-th evaluation dense; 1: all of them. Other arguments as of `tapered`."""
        if n == 0:
            raise OptionError("plan: every=0: must be at least 1; write Plan.warmup(1) for no more")
        return cls((), settings, rule=Rule(warmup, n), lookahead=lookahead)

    @classmethod
    def warmup(cls, n: int, *, lookahead: int = LOOKAHEAD, **settings: Any) -> Plan:
        """So many dense evaluations, then none: the paper's. Other arguments as of `tapered`."""
        return cls((), settings, rule=Rule(n), lookahead=lookahead)

    @classmethod
    def of(
        cls, evaluations: int, dense: Sequence[int], *, lookahead: int = LOOKAHEAD, **settings: Any
    ) -> Plan:
        """A list: so many evaluations, those at the indices `dense` dense, the others gaps.

        Raises:
            OptionError: An index of none of them, or the first is not dense.
        """
        for index in dense:
            if index not in range(evaluations):
                raise OptionError(f"plan: dense={index!r}: must be from 0 to {evaluations - 1}")
        ratios = tuple(float(i not in dense) for i in range(evaluations))
        return cls(ratios, settings, lookahead=lookahead)

    @classmethod
    def load(cls, source: Plan | Mapping[str, Any] | str | os.PathLike[str]) -> Plan:
        """A plan from a file, or from its content.

        Raises:
            OptionError: It cannot be read or a field is wrong; says which.
        """
        if isinstance(source, Plan):
            return source
        if isinstance(source, Mapping):
            return _parsed(source, "plan")
        try:
            return _parsed(json.loads(Path(source).read_text(encoding="utf-8")), str(source))
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"plan: cannot read {os.fspath(source)!r}: {error}") from error
        except json.JSONDecodeError as error:
            raise OptionError(f"{source}: not JSON: {error}") from error

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write it as `load` reads it.

        Raises:
            OptionError: A setting or note is nothing that JSON has, such as an infinite number.
        """
        lines = [f'  "{KEY}": {FORMAT}']
        lines += [f'  "{name}": {_json(value, name)}' for name, value in self._fields()]
        Path(file).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        """What `save` writes."""
        return {KEY: FORMAT, **dict(self._fields())}

    def _fields(self) -> list[tuple[str, Any]]:
        """All but the format, those left out that say nothing."""
        first = ("evaluations", [_word(ratio) for ratio in self.ratios])
        return [
            first if self.rule is None else ("rule", self.rule.to_json()),
            *([("lookahead", self.lookahead)] if self.lookahead != LOOKAHEAD else []),
            *([("settings", dict(self.settings))] if self.settings else []),
            *([("notes", dict(self.notes))] if self.notes else []),
        ]

    def filled(self, cache_ratio: float) -> Plan:
        """This plan with selective evaluations of `cache_ratio` in place of those it skips."""
        if self.rule is not None or cache_ratio == 1:
            return self
        ratios = tuple(cache_ratio if ratio == 1 else ratio for ratio in self.ratios)
        return dataclasses.replace(self, ratios=ratios)

    @property
    def dense(self) -> tuple[int, ...]:
        """Indices of the dense evaluations of a list."""
        return tuple(i for i, ratio in enumerate(self.ratios) if ratio == 0)

    def due(self, index: int, total: float, before: float) -> int | None:
        """The entry of a list that evaluation `index` of a run follows; None: it is in a gap.

        Entry i of N belongs to the evaluation nearest to i / N of the way in time. If several
        belong to one evaluation, the one that computes most counts. So the dense evaluations lie at
        the same noise in a run of any length. For the list dense, skip, skip, dense:

            evaluations in the run    entries that they follow
            4                         0, 1, 2, 3
            3                         0, 1, 3           of 2 and 3, the dense one counts
            8                         0, -, 1, -, 2, -, 3, -

        A last evaluation that is hardly a step, as in Stable Diffusion 3, follows the last entry,
        as does the one before it: it removes the rest of the noise.

        Args:
            index: of the evaluation, from 0.
            total: evaluations until time ends, as far as is known now; need not be whole.
            before: `total` as it was known at the previous evaluation.
        """
        if index >= before:  # the run is longer than it seemed: nobody knows what is left
            return self.dense[-1]
        first = self._reached(index - 1, before) + 1 if index else 0
        if first == len(self.ratios) and index + 0.5 > total:
            return first - 1
        entries = range(first, self._reached(index, total) + 1)
        return min(entries, key=lambda entry: self.ratios[entry], default=None)

    def _reached(self, index: int, total: float) -> int:
        """The last entry that belongs to evaluation `index` or an earlier one."""
        count = len(self.ratios)
        if index + 1.5 > total:  # the last evaluation, or one before a last that is hardly a step
            return count - 1
        return min(math.ceil((index + 0.5) * count / total) - 1, count - 1)


def _json(value: object, name: str) -> str:
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise OptionError(f"plan: {name}={value!r}: must be JSON: {error}") from error


def _word(ratio: float) -> str | float:
    return {0.0: DENSE, 1.0: SKIP}.get(ratio, ratio)


def _parsed(parsed: object, source: str) -> Plan:
    if not isinstance(parsed, Mapping):
        raise OptionError(f"{source}: must be an object with {', '.join(FIELDS)}")
    if unknown := [name for name in parsed if name not in FIELDS]:
        raise OptionError(f"{source}: {unknown[0]}: no such field; fields: {', '.join(FIELDS)}")
    if parsed.get(KEY) != FORMAT:
        raise OptionError(f"{source}: {KEY}={parsed.get(KEY)!r}: must be {FORMAT}")
    if ("evaluations" in parsed) == ("rule" in parsed):
        raise OptionError(f"{source}: must have evaluations or a rule, one of them")
    for name in ("settings", "notes"):
        _check_object(parsed.get(name, {}), f"{source}: {name}")
    lookahead = parsed.get("lookahead", LOOKAHEAD)
    _check_count(lookahead, f"{source}: lookahead")
    rest = dict(parsed.get("settings", {})), dict(parsed.get("notes", {}))
    if "rule" in parsed:
        return Plan((), *rest, Rule.from_json(parsed["rule"], f"{source}: rule"), lookahead)
    return Plan(_ratios(parsed["evaluations"], f"{source}: evaluations"), *rest, None, lookahead)


def _check_count(value: object, where: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise OptionError(f"{where}={value!r}: must be an integer of at least 0")


def _check_object(value: object, where: str) -> None:
    if not isinstance(value, Mapping):
        raise OptionError(f"{where}={value!r}: must be an object")


def _ratios(values: object, where: str) -> tuple[float, ...]:
    """The evaluations of a plan as it keeps them."""
    if not isinstance(values, (list, tuple)) or len(values) < 2:
        raise OptionError(f"{where}: must be a list of at least 2")
    ratios = tuple(_ratio(value, f"{where}[{i}]") for i, value in enumerate(values))
    if ratios[0] != 0:
        raise OptionError(f"{where}[0]={values[0]!r}: must be {DENSE!r}")
    return ratios


def _ratio(value: object, where: str) -> float:
    if value in (DENSE, SKIP):
        return float(value == SKIP)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise OptionError(
        f"{where}={value!r}: must be {DENSE!r}, {SKIP!r} or a cache ratio from 0 to 1"
    )
