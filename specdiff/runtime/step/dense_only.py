"""What answers a graph of which nothing can be left out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from specdiff.runtime.records.recording import StepRecord, recorded
from specdiff.runtime.streams.registry import ModelState, state_of_call

logger = logging.getLogger(__name__)


class DenseOnly:
    """Answers a graph that the compiler refused to rewrite: dense, with the reason in the stats.

    Args:
        function: takes the graph's flat inputs and returns its outputs.
        reason: why the graph was refused.
        parameters: positions of the model's parameters among the inputs.
        unplanned: why its whole steps cannot be forecast, where that is another reason.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        reason: str,
        parameters: Sequence[int],
        unplanned: str = "",
    ) -> None:
        self._function = function
        self._reason = self.unselectable = reason
        self.unplanned = unplanned or reason
        self._parameters = tuple(parameters)
        self._nameless = ModelState()

    def __call__(self, *inputs: object) -> Any:
        """The function's outputs, gradients included."""
        state = state_of_call(self, inputs, self._parameters, self._nameless)
        state.count_dense(self._reason)
        state.say(logger, f"running dense: {self._reason}")

        def answer(record: StepRecord | None) -> Any:
            if record is not None:
                record.reason = self._reason
            return self._function(*inputs)

        device = next((i.device for i in inputs if isinstance(i, Tensor)), torch.device("cpu"))
        return recorded(state.recordings, device, answer)
