"""Watched: a module whose calls go to somebody else first.

The module gets a class of its own, derived from its class, as FSDP2 does: so it does not matter
whether it is compiled in place, or others replace its forward, before or after.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Answer = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""(the module's own call, args, kwargs) -> output."""

ANSWER = "_specdiff_answer"
"""Attribute of a watched module: the module it was made for, not a copy, and who answers."""


def watch(module: nn.Module, answer: Answer) -> None:
    """Let `answer` have every call of the module, until `unwatch`."""
    module.__dict__[ANSWER] = (weakref.ref(module), answer)
    if not getattr(type(module), "_specdiff_watches", False):
        module.__class__ = _watching(type(module))


def unwatch(module: nn.Module) -> None:
    """Undo `watch`; nothing if it was not called."""
    module.__dict__.pop(ANSWER, None)
    if type(module).__dict__.get("_specdiff_watches"):
        module.__class__ = type(module).__mro__[1]


def answer_of(module: nn.Module) -> Answer | None:
    """Who answers the module's calls; None of a module that is not watched, or of a copy."""
    answer = module.__dict__.get(ANSWER)
    return answer[1] if answer is not None and answer[0]() is module else None


def _watching(base: type[nn.Module]) -> type[nn.Module]:
    """A class of the same name whose calls are answered."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = super(watching, self).__call__  # type: ignore[misc]
        # traced, it is the model alone: a graph makes no decisions
        answer = None if torch.compiler.is_compiling() else answer_of(self)
        return own(*args, **kwargs) if answer is None else answer(own, args, kwargs)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        """A copy, as a pickle makes too, is of the module's own class, and nobody's."""
        reduced: Any = super(watching, self).__reduce_ex__(protocol)
        made, given, *rest = reduced
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: value for name, value in rest[0].items() if name != ANSWER}
        given = tuple(base if each is watching else each for each in given)
        return (_make, (base if made is watching else made, given), *rest)

    space = {
        "__call__": call,
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_specdiff_watches": True,
    }
    watching: type[nn.Module] = type(base.__name__, (base,), space)
    return watching


def _make(function: Callable[..., nn.Module], given: tuple[Any, ...]) -> nn.Module:
    """What pickle calls: it takes a call of a class only from an object of that class."""
    return function(*given)
