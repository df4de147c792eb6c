"""Caller: the model that a graph is a part of, found by who is calling while it is compiled.

A backend sees one graph at a time. Where a model breaks into many, its forward is under way while
they are compiled, so it lies on the Python stack, with a time among its arguments.

    FluxTransformer2DModel.forward(self, hidden_states, timestep, ...)    <- found: has a time
      FluxTransformerBlock.forward(self, hidden_states, temb, ...)        <- has none
        the backend, given a graph of the block
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterator
from types import FrameType

from torch import nn

from specdiff.torch_adapter import MODULE_CALLS

IsTime = Callable[[str], bool]


def model_of_part(
    parameters: Collection[nn.Parameter], is_time: IsTime, *, is_cut: bool
) -> nn.Module | None:
    """The outermost model under way that has a time and more than these parameters.

    None where the graph is the whole of a model, or where nobody knows. A graph without parameters
    is never a model, and neither is one that a break has cut off.

    Args:
        parameters: of the graph.
        is_time: whether an argument of this name is a time.
        is_cut: whether a break ends the graph: then the model's forward may begin with it, and is
            not seen to be under way.
    """
    mine = {id(parameter) for parameter in parameters}
    outermost = None
    for frame in _callers():
        if _has_time(frame, is_time, in_call=is_cut or not mine):
            model = frame.f_locals.get("self")
            if isinstance(model, nn.Module) and mine < {id(each) for each in model.parameters()}:
                outermost = model
    return outermost


def calling_module() -> nn.Module | None:
    """The innermost module under way."""
    for frame in _callers():
        if frame.f_code.co_varnames[:1] == ("self",):
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module):
                return module
    return None


def _callers() -> Iterator[FrameType]:
    """Frames from the innermost to the outermost."""
    frame = sys._getframe(1) if hasattr(sys, "_getframe") else None
    while frame is not None:
        yield frame
        frame = frame.f_back


def _has_time(frame: FrameType, is_time: IsTime, *, in_call: bool) -> bool:
    """Whether a time is among a frame's arguments, or those of the forward that it calls.

    `Module.__call__` does not tell a model that is compiled whole from one that is under way, so it
    counts only if asked for. Of other frames the locals are not looked at: up to Python 3.12 that
    keeps what they name alive until the function returns.
    """
    code = frame.f_code
    if any(map(is_time, code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])):
        return True
    if not in_call or code not in MODULE_CALLS:
        return False
    given = frame.f_locals.get("kwargs")
    # that of the class: hooks put other functions in the place of the instance's
    taken = inspect.signature(type(frame.f_locals["self"]).forward).parameters
    return any(map(is_time, (*taken, *(given if isinstance(given, dict) else ()))))
