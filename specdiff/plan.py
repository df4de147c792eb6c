"""Plans as data: what each evaluation of a generation computes, stated in a small JSON file.

    {
      "specdiff_plan": 1,
      "evaluations": ["dense", "skip", 0.9, "dense"],
      "settings": {"forecast": "linear", "correction": true},
      "notes": {"psnr_db": 44.1}
    }

An evaluation is "dense", "skip" (forecast whole), or the cache ratio of a selective one. `settings`
are options, which what the caller gives himself outranks; `notes` are for the reader. Only the
first two are needed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specdiff.errors import OptionError

FORMAT = 1
"""Number of the file's layout, under the key `KEY`."""
KEY = "specdiff_plan"
DENSE, SKIP = "dense", "skip"
FIELDS = (KEY, "evaluations", "settings", "notes")


@dataclass(frozen=True)
class Plan:
    """What each evaluation of a generation computes.

    Raises `OptionError` for a field that is wrong; `Options` checks what is in `settings`.
    """

    ratios: tuple[float, ...]
    """Share of image tokens that each evaluation does not compute: 0 dense, 1 skipped."""
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Options that it was made with, by name."""
    notes: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)
    """What a reader may want to know, such as what it was measured to keep."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", _ratios(self.ratios, "plan: ratios"))
        for name in ("settings", "notes"):
            _check_object(getattr(self, name), f"plan: {name}")

    @classmethod
    def of(cls, evaluations: int, dense: Sequence[int], **settings: Any) -> Plan:
        """Whole steps only: so many evaluations, those at the indices `dense` computed.

        Raises:
            OptionError: An index of none of them, or the first is not dense.
        """
        for index in dense:
            if index not in range(evaluations):
                raise OptionError(f"plan: dense={index!r}: must be from 0 to {evaluations - 1}")
        return cls(tuple(float(i not in dense) for i in range(evaluations)), settings)

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
        evaluations = ", ".join(json.dumps(_word(ratio)) for ratio in self.ratios)
        lines = [f'  "{KEY}": {FORMAT}', f'  "evaluations": [{evaluations}]']
        lines += [
            f'  "{name}": {_json(values, name)}'
            for name, values in (("settings", self.settings), ("notes", self.notes))
            if values
        ]
        Path(file).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    @property
    def dense(self) -> tuple[int, ...]:
        """Indices of the dense evaluations."""
        return tuple(i for i, ratio in enumerate(self.ratios) if ratio == 0)

    def due(self, index: int, total: float, before: float) -> int | None:
        """The entry that evaluation `index` of a run follows, if any.

        Entry i of N has its place at i / N of the way in time, and goes to the evaluation nearest
        to it; of several there the one that computes most counts, and where there is none the
        evaluation is skipped. So the dense evaluations of a shorter or longer run lie where they
        lay in noise, and a longer run gains more. A last evaluation that is hardly a step, as that
        of Stable Diffusion 3, has the last entry like the one before it: it rids pictures of noise.

        Args:
            index: of the evaluation, from 0.
            total: evaluations until time ends, as far as is known; need not be whole.
            before: the same, as it was known at the previous evaluation.
        """
        if index >= before:  # the run is longer than was thought: what is left is unknown
            return self.dense[-1]
        first = self._reached(index - 1, before) + 1 if index else 0
        if first == len(self.ratios) and index + 0.5 > total:
            return first - 1
        entries = range(first, self._reached(index, total) + 1)
        return min(entries, key=lambda entry: self.ratios[entry], default=None)

    def _reached(self, index: int, total: float) -> int:
        """The last entry whose place is nearest to evaluation `index` or an earlier one."""
        count = len(self.ratios)
        if index + 1.5 > total:  # the last one, or what follows it is hardly a step
            return count - 1
        return min(math.ceil((index + 0.5) * count / total) - 1, count - 1)


def _json(values: Mapping[str, Any], name: str) -> str:
    try:
        return json.dumps(dict(values), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise OptionError(f"plan: {name}={values!r}: must be JSON: {error}") from error


def _word(ratio: float) -> str | float:
    return {0.0: DENSE, 1.0: SKIP}.get(ratio, ratio)


def _parsed(found: object, source: str) -> Plan:
    if not isinstance(found, Mapping):
        raise OptionError(f"{source}: must be an object with {', '.join(FIELDS)}")
    if unknown := [name for name in found if name not in FIELDS]:
        raise OptionError(f"{source}: {unknown[0]}: no such field; fields: {', '.join(FIELDS)}")
    if found.get(KEY) != FORMAT:
        raise OptionError(f"{source}: {KEY}={found.get(KEY)!r}: must be {FORMAT}")
    ratios = _ratios(found.get("evaluations"), f"{source}: evaluations")
    for name in ("settings", "notes"):
        _check_object(found.get(name, {}), f"{source}: {name}")
    return Plan(ratios, dict(found.get("settings", {})), dict(found.get("notes", {})))


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
