"""Row operands: the arguments of one call of a row-wise op, with nothing merged.

the op gets                        the node gets             merged
q           [B * N, H, D]          q           [B, N, H, D]  (2, 1)
positions   [B * N]                positions   [B, N]        (2,)
cos         [N, D], by token       cos         [B, N, D]     (2,), and then q (0, 2, 1):
                                                             all samples are one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import fx

from specdiff.passes.normalize.rewrite import call, reshaped
from specdiff.passes.normalize.row_axes import groups_of, split_axes
from specdiff.passes.rules.registry import is_tensor, operand_at, rank_of, shape_of
from specdiff.passes.rules.row_results import Fresh, Groups
from specdiff.passes.rules.rowwise import RowOperands
from specdiff.passes.rules.shape import VIEWS
from specdiff.torch_adapter import OpCall

aten = torch.ops.aten
EMPTY = (aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default)


class Misfit(Exception):
    """The call is none that the table of row-wise ops describes."""


@dataclass
class Unmerged:
    """The arguments of one call; the fields are those of `row_results`."""

    before: fx.Node
    """New nodes go in front of this one."""
    found: OpCall
    operands: RowOperands
    like: str = ""
    merged: dict[str, Groups] = field(default_factory=dict)
    fresh: dict[str, Fresh] = field(default_factory=dict)
    axes: list[int] = field(default_factory=list)
    """Those of rows, samples and tokens first."""
    seen: tuple[int, ...] = ()
    """The same as the op gets them."""
    groups: Groups = ()

    def arguments(self, results: Sequence[fx.Node]) -> dict[str, object]:
        """All arguments, for the values that hold the results.

        Raises:
            Misfit: some do not go by rows.
        """
        given = dict(self.found.arguments)
        by_rows = {n: value for n, value in given.items() if self._goes_by_rows(n, value)}
        self._take_fresh(given, by_rows)
        self._find_axes(by_rows, results)
        by_token = [name for name in self.operands.tokens if is_tensor(given.get(name))]
        for name in by_token:
            given[name] = self._token_operand(name, given[name])
        for name, value in by_rows.items():
            given[name] = self._row_operand(name, value)
        return given

    def _goes_by_rows(self, name: str, value: object) -> bool:
        if isinstance(value, list | tuple) and any(isinstance(item, fx.Node) for item in value):
            raise Misfit
        if not is_tensor(value) or name in self.operands.tokens | self.operands.shared:
            return False
        if rank_of(value) < 2 and not value.meta["val"].is_floating_point():
            raise Misfit  # it may pick rows, or say where samples begin
        return rank_of(value) > 1

    def _take_fresh(self, given: dict[str, object], by_rows: dict[str, fx.Node]) -> None:
        """Move what the op writes to without reading it to `fresh`."""
        for name in (key for key in self.found.results if isinstance(key, str)):
            value = by_rows.get(name)
            if value is None:
                raise Misfit
            if _base(value).target in EMPTY:
                self.fresh[name] = (shape_of(value)[-1:], value.meta["val"].dtype)
                del given[name], by_rows[name]

    def _find_axes(self, by_rows: dict[str, fx.Node], results: Sequence[fx.Node]) -> None:
        """The most axes that views of the results tell of, else those before the operands."""
        self.seen = max((shape_of(v)[:-1] for v in by_rows.values()), key=prod, default=())
        full = {name: v for name, v in by_rows.items() if shape_of(v)[:-1] == self.seen}
        if not full or any(shape_of(result)[:-1] != self.seen for result in results):
            raise Misfit
        self.like, value = next(iter(full.items()))
        users = [user for result in results for user in result.users]
        if all(user.target in VIEWS for user in users):
            others = [shape_of(user) for user in users]
        else:  # the next op takes the axes as they are; nothing tells samples from tokens in one
            others = [] if len(self.seen) > 1 else [shape_of(_base(v)) for v in full.values()]
        found = [split_axes(shape, shape_of(value)) or [] for shape in others]
        self.axes = max((*found, list(self.seen)), key=len)
        groups = groups_of(self.axes, self.seen)
        if groups is None or len(self.axes) < 2:
            raise Misfit
        self.groups = groups

    def _row_operand(self, name: str, value: fx.Node) -> fx.Node:
        """An operand by rows, with the axes of rows; where it has one of something, ones."""
        *leading, last = shape_of(value)
        folded = self.groups[0] == 0
        if name in self.operands.samples and len(leading) == 1 and len(self.seen) > 1:
            if folded or self.groups[0] > 1 or leading[0] not in (1, self.axes[0]):
                raise Misfit
            self.merged[name] = (len(self.axes),)
            return self._reshaped(value, [*leading, *[1] * (len(self.axes) - 1), last])
        if len(leading) != len(self.seen) or (folded and tuple(leading) != self.seen):
            raise Misfit
        sizes, rest = [], list(self.axes)
        for size, full, count in zip(leading, self.seen, self._counts(), strict=True):
            if size not in (1, full):
                raise Misfit
            sizes += rest[:count] if size == full else [1] * count
            rest = rest[count:]
        self.merged[name] = self.groups
        return self._reshaped(value, [*sizes, last])

    def _counts(self) -> Groups:
        """The groups before samples were folded into tokens."""
        return (1, 1, *self.groups[2:]) if self.groups[0] == 0 else self.groups

    def _token_operand(self, name: str, value: object) -> fx.Node:
        """An operand by token as [B, N, ...]."""
        assert is_tensor(value)
        shape, (samples, tokens) = shape_of(value), self.axes[:2]
        if samples == tokens > 1:
            raise Misfit  # nobody can tell which of the two an axis counts
        if shape[:2] == (samples, tokens):
            self.merged[name] = (1, 1)
            return value
        if shape[:1] == (samples * tokens,):
            self.merged[name] = (2,)
            return self._reshaped(value, [samples, tokens, *shape[1:]])
        self._fold()
        if shape[:1] == (tokens,):
            self.merged[name] = (2,)
            value = call(self.before, aten.unsqueeze.default, value, 0)
        elif shape[:2] == (1, tokens):
            self.merged[name] = (0, 2)
        else:
            raise Misfit
        whole = [samples, *shape_of(value)[1:]]
        return call(self.before, aten.expand.default, value, whole)

    def _fold(self) -> None:
        """Let the op get all samples as one: each then has tokens, and a table, of its own."""
        if self.groups[0] == 0:
            return
        if self.groups[:2] != (1, 1):
            raise Misfit
        self.groups = (0, 2, *self.groups[2:])

    def _reshaped(self, value: fx.Node, shape: list[int]) -> fx.Node:
        return reshaped(self.before, _base(value), shape)


def _base(value: fx.Node) -> fx.Node:
    """What a value is a view of."""
    while value.target in VIEWS:
        value = operand_at(value, 0)
    return value
