"""The plan of a selective step: what it computes, what it reads from caches, what it looks up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

import torch
from torch import fx

from specdiff.passes.plan.needs import propagate
from specdiff.passes.plan.token_facts import TokenFacts


@dataclass(frozen=True)
class Timetable:
    """How values are computed for many times."""

    values: tuple[fx.Node, ...]
    """Of the traced graph: what is tabulated."""
    time: fx.Node
    leaves: tuple[fx.Node, ...]
    """Inputs and constants of the traced graph that the values are made of, time among them."""
    module: fx.GraphModule
    """From the leaves, TIMES_AT_ONCE times in place of one, to the values, as many of each."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SelectivePlan(TokenFacts):
    """Which values the selective program needs in which form; `replan` says it first."""

    slots: tuple[fx.Node, ...] = ()
    """The token-level outputs: what the model computes per token before the tail, a slot a prunable
    segment or more. A block has none: its outputs are whole."""
    tail: tuple[fx.Node, ...] = ()
    """Nodes from the slots to the outputs, in order."""
    rows: frozenset[fx.Node] = frozenset()
    whole: frozenset[fx.Node] = frozenset()
    cached: tuple[fx.Node, ...] = ()
    """Values that live in caches, in graph order."""
    fixed: tuple[fx.Node, ...] = ()
    """Values that no step changes (`invariant`), kept beside the caches."""
    timetable: Timetable | None = None
    """Of values that time alone moves (`timetable`), if there are any."""
    untabulated: str = ""
    """Why there is none although there are such values."""
    codes: Mapping[fx.Node, torch.dtype] = field(default_factory=dict)
    """Those of the cached whose caches hold 8-bit codes (`quantize`), of this dtype."""

    @property
    def tabulated(self) -> tuple[fx.Node, ...]:
        """Values that a selective step looks up by time."""
        return self.timetable.values if self.timetable is not None else ()

    @cached_property
    def known(self) -> frozenset[fx.Node]:
        """Values that a selective step finds computed, whole."""
        return frozenset((*self.fixed, *self.tabulated))

    @property
    def channels(self) -> int:
        """C of the widest slot, all axes but samples and tokens taken together."""
        return max(prod(self.cache_shape(slot)[2:]) for slot in self.slots)

    def replan(
        self, *, fixed: tuple[fx.Node, ...] | None = None, timetable: Timetable | None = None
    ) -> SelectivePlan:
        """The plan with more values known: what only they needed is no longer computed.

        Args:
            fixed: values that no step changes; of these, the plan keeps those that are needed.
            timetable: of values that are looked up by time.

        Returns:
            A plan whose `rows`, `whole` and `cached` follow from its outputs and what is known. An
            argument left out stays as it is.
        """
        told = replace(
            self,
            fixed=self.fixed if fixed is None else fixed,
            timetable=self.timetable if timetable is None else timetable,
        )
        needs = propagate(told, self.slots, () if self.slots else self.axes.outputs(), told.known)
        still = tuple(node for node in told.fixed if node in needs.whole)
        return replace(told, **needs._asdict(), fixed=still)
