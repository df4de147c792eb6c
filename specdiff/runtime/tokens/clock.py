"""Clock: times and weights that all tokens share, or that are each row's or each token's own.

    tokens computed together      700.0     numbers of the host: a weight costs nothing to find
    rows at times of their own    [B, 1]
    tokens computed apart         [B, N]

The same formulas serve for all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Clock = float | Tensor
"""A number of the host, a scalar on the device, or float32 [B, 1] or [B, N]."""


def ratio(part: Clock, whole: Clock) -> Clock:
    """`part / whole`, 0 where `whole` is 0."""
    if isinstance(whole, Tensor):
        still = whole == 0
        return torch.where(still, 0.0, part / torch.where(still, 1.0, whole))
    return part / whole if whole else 0.0


def within(value: Clock, limit: Clock) -> Clock:
    """`value`, from -`limit` to `limit`."""
    if isinstance(limit, Tensor):
        values = value if isinstance(value, Tensor) else torch.full_like(limit, value)
        return values.clamp(-limit, limit)
    if isinstance(value, Tensor):
        return value.clamp(-limit, limit)
    return max(-limit, min(limit, value))


def distance(one: Clock, other: Clock) -> Clock:
    """How far apart they are."""
    apart = one - other
    return apart.abs() if isinstance(apart, Tensor) else abs(apart)


def chosen(condition: Clock, value: Any, other: Any) -> Any:
    """`value` where the condition, a bool or a tensor of them, holds, else `other`."""
    if isinstance(condition, Tensor):
        return torch.where(condition, value, other)
    return value if condition else other


def scaled(values: Tensor, weight: Clock) -> Tensor:
    """`weight` times values [B, N, C], which may come back as they are."""
    is_one = not isinstance(weight, Tensor) and weight == 1
    return values if is_one else values * of_values(weight)


def plus(values: Tensor, more: Tensor, weight: Clock) -> Tensor:
    """`values + weight more`, both [B, N, C]."""
    if isinstance(weight, Tensor):
        return torch.addcmul(values, more, _of_tokens(weight))
    return torch.add(values, more, alpha=weight)


def beyond(newer: Tensor, older: Tensor, share: Clock) -> Tensor:
    """The line from `older` to `newer`, [B, N, C], a share of that way further, in their dtype."""
    if isinstance(share, Tensor):
        start = newer.float()
        return plus(start, start - older.float(), share).to(newer.dtype)
    return torch.lerp(newer, older, -share)


def of_values(weight: Clock) -> Clock:
    """To multiply [B, N, C] by."""
    return _of_tokens(weight) if isinstance(weight, Tensor) else weight


def _of_tokens(weight: Tensor) -> Tensor:
    return weight.unsqueeze(-1) if weight.dim() else weight
