"""Row parts: some rows of a call or of its output, and outputs put together again.

The batch is the first axis of every tensor that has as many entries, and a list of as many tensors
is a list of samples, unless its tensors have the batch themselves.

    [4, 16, 64, 64], rows 0 and 2      -> [2, 16, 64, 64]
    [s0, s1, s2, s3], rows 0 and 2     -> [s0, s2]
    0-d, [1, ...], None, a number      -> as it is
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def taken(value: Any, rows: Sequence[int], batch: int) -> Any:
    """Copies of these rows, wherever `value` has rows.

    Args:
        value: tensors in tuples, lists, dicts and dataclasses.
        rows: their numbers; one may be there twice.
        batch: how many `value` has.
    """
    if isinstance(value, Tensor):
        index = torch.tensor(rows, device="cpu").to(value.device, non_blocking=True)
        return value.index_select(0, index) if _has_rows(value, batch) else value
    if isinstance(value, list) and _are_samples(value, batch):
        return [value[row] for row in rows]
    return _of_parts(value, lambda part: taken(part, rows, batch))


def joined(values: Sequence[Any], rows: Sequence[Sequence[int]], batch: int) -> Any:
    """What has the rows of all `values`.

    Args:
        values: outputs of a model, of the same structure.
        rows: which rows of the whole each has, all together 0 to `batch` - 1.
        batch: of the whole.
    """
    first = values[0]
    order = [row for each in rows for row in each]
    if isinstance(first, Tensor):
        if not _has_rows(first, len(rows[0])):
            return first
        whole = torch.cat([*values])
        return whole if order == sorted(order) else taken(whole, _inverse(order), batch)
    if isinstance(first, list) and _are_samples(first, len(rows[0])):
        samples = [sample for value in values for sample in value]
        return [samples[place] for place in _inverse(order)]
    parts = zip(*(_parts(value) for value in values), strict=True)
    whole_parts = iter([joined(part, rows, batch) for part in parts])
    return _of_parts(first, lambda _: next(whole_parts))


def _has_rows(value: Tensor, batch: int) -> bool:
    return value.dim() > 0 and len(value) == batch


def _are_samples(value: list[Any], batch: int) -> bool:
    tensors = all(isinstance(item, Tensor) for item in value)
    return tensors and len(value) == batch and not all(_has_rows(each, batch) for each in value)


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _parts(value: Any) -> list[Any]:
    """What `_of_parts` hands to its function, in order."""
    parts: list[Any] = []
    _of_parts(value, parts.append)
    return parts


def _of_parts(value: Any, of: Callable[[Any], Any]) -> Any:
    """The same container of what `of` makes of each part; anything else as it is."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return type(value)(**{name: of(getattr(value, name)) for name in fields})
    if isinstance(value, dict):
        return type(value)({name: of(part) for name, part in value.items()})
    if isinstance(value, (list, tuple)):
        parts = [of(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
