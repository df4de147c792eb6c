"""The selection: what a selective step computes, reads from caches and looks up in tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

import torch
from torch import fx

from specdiff.passes.select.needs import propagate
from specdiff.passes.select.token_facts import TokenFacts


@dataclass(frozen=True)
class Timetable:
    """Values that are looked up by time, and how to compute them for many times at once."""

    values: tuple[fx.Node, ...]
    """What is tabulated, as nodes of the traced graph."""
    time: fx.Node
    leaves: tuple[fx.Node, ...]
    """Inputs and constants of the traced graph that the values depend on, time among them."""
    module: fx.GraphModule
    """Computes the values from the leaves, each for TIMES_AT_ONCE times instead of one."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Selection(TokenFacts):
    """Which values a selective step needs, and in which form (`select.needs`).

    `with_needs` computes the forms; a new selection has none yet.
    """

    slots: tuple[fx.Node, ...] = ()
    """The token-level outputs; each has one prunable segment or more. A block has none: its outputs
    are whole."""
    tail: tuple[fx.Node, ...] = ()
    """Nodes from the slots to the outputs, in order."""
    rows: frozenset[fx.Node] = frozenset()
    whole: frozenset[fx.Node] = frozenset()
    cached: tuple[fx.Node, ...] = ()
    """Values that live in caches, in graph order."""
    fixed: tuple[fx.Node, ...] = ()
    """Values that no step changes (`invariant`); they are stored beside the caches."""
    timetable: Timetable | None = None
    """Values that depend on time alone (`timetable`), if there are any."""
    untabulated: str = ""
    """Why such values cannot be tabulated; empty if they are, or if there are none."""
    codes: Mapping[fx.Node, torch.dtype] = field(default_factory=dict)
    """The cached values that are stored as 8-bit codes (`quantize`), with the codes' dtype."""

    @property
    def tabulated(self) -> tuple[fx.Node, ...]:
        """Values that a selective step looks up by time."""
        return self.timetable.values if self.timetable is not None else ()

    @cached_property
    def known(self) -> frozenset[fx.Node]:
        """Values that a selective step reads whole instead of computing them."""
        return frozenset((*self.fixed, *self.tabulated))

    @property
    def channels(self) -> int:
        """C of the widest slot: all its axes but batch and tokens, flattened."""
        return max(prod(self.cache_shape(slot)[2:]) for slot in self.slots)

    def with_needs(
        self, *, fixed: tuple[fx.Node, ...] | None = None, timetable: Timetable | None = None
    ) -> Selection:
        """The same selection with its needs computed: `rows`, `whole` and `cached`.

        They follow from the outputs and the known values. An argument makes more values known, and
        what only these depended on is no longer needed.

        Args:
            fixed: values that no step changes; those that are not needed are dropped. None: the
                present ones.
            timetable: values to look up by time. None: the present ones.
        """
        selection = replace(
            self,
            fixed=self.fixed if fixed is None else fixed,
            timetable=self.timetable if timetable is None else timetable,
        )
        outputs = () if self.slots else self.axes.outputs()
        needs = propagate(selection, self.slots, outputs, selection.known)
        needed = tuple(node for node in selection.fixed if node in needs.whole)
        return replace(selection, **needs._asdict(), fixed=needed)
