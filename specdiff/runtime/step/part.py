"""Part: answers a graph that is not a whole model, of a model that nobody attached."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from specdiff.caller import calling_module
from specdiff.runtime.streams.registry import ModelState, first_parameter

logger = logging.getLogger(__name__)

BROKEN = "the model breaks into graphs, and no single one knows its steps"


class Part:
    """Runs the graph as it is, and counts the evaluations of its model.

    A new evaluation begins where a part that the latest one has run runs again.

    Args:
        function: the graph, compiled; takes its flat inputs.
        state: of the model, shared by its parts.
        parameters: positions of the model's parameters among the inputs.
        remedy: what its user can do, said once a model.
    """

    unplanned = unselectable = BROKEN

    def __init__(
        self,
        function: Callable[..., Any],
        state: ModelState,
        parameters: Sequence[int],
        remedy: str,
    ) -> None:
        self._function = function
        self._state = state
        self._parameters = tuple(parameters)
        self._remedy = remedy
        state.graphs[self] = id(self)

    def __call__(self, *inputs: object) -> Any:
        """The graph's outputs, gradients included."""
        state, first = self._state, first_parameter(inputs, self._parameters)
        if state.parts_run is None:
            state.parts_run = set()
            state.say(logger, f"running dense: {BROKEN}: {self._remedy}")
        if first is not None:
            # offloading may swap the parameters of a module, but never the module
            self._count((id(self), id(calling_module())), state.parts_run)
        return self._function(*inputs)

    def _count(self, part: tuple[int, int], run: set[tuple[int, int]]) -> None:
        """Blocks of a class share a graph, so a part is one with the module that runs it."""
        if not run or part in run:
            run.clear()
            self._state.count_dense(BROKEN)
        run.add(part)
