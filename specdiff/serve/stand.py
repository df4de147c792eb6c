"""Stand-in: takes the place of the denoiser in the pipeline of one generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

Answer = Callable[[str, tuple[Any, ...], Mapping[str, Any]], Any]
"""What answers a call: the name of the part of guidance that it is, its arguments by place and by
name."""


class StandIn(nn.Module):
    """Looks like the model, whose calls are answered by somebody else.

    Args:
        model: Who is looked at for everything but calls.
        answer: Who answers these.
    """

    def __init__(self, model: nn.Module, answer: Answer) -> None:
        super().__init__()
        # Not a part of it: the pipeline moves and counts what is.
        self.__dict__["_model"] = model
        self.__dict__["_answer"] = answer
        self.__dict__["_part"] = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_model"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As of the model."""
        return self.__dict__["_answer"](self.__dict__["_part"], args, kwargs)

    @contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """Pipelines say by it which half of guidance a call is."""
        self.__dict__["_part"] = name
        try:
            yield
        finally:
            self.__dict__["_part"] = ""
