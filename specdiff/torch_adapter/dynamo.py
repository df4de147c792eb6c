"""Dynamo: what it compiled, where it breaks, and the default backend of the process."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import fx
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from torch._guards import CompileContext

MODULE_CALLS = (torch.nn.Module._call_impl.__code__, torch.nn.Module._wrapped_call_impl.__code__)
"""Code through which every module is called."""


def _forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return self._call_impl(*args, **kwargs)  # whatever it is compiled with in place


def trace_once(
    model: torch.nn.Module,
    backend: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> None:
    """Run `model` once, its graphs given to `backend`, whatever was compiled of it before.

    Dynamo keeps variants, their limit and the sizes it has seen by code object: this takes a new
    one, so that the model's own are left alone.
    """
    forward = FunctionType(_forward.__code__.replace(), globals())
    torch.compile(forward, backend=backend, dynamic=False)(model, *args, **kwargs)


def graphs_compiled() -> int:
    """How many graphs Dynamo has handed to a backend since `forget_compiled`."""
    return int(counters["stats"]["unique_graphs"])


def is_cut(module: fx.GraphModule) -> bool:
    """Whether a break ends a Dynamo graph, rather than the return of a function."""
    return bool(getattr(getattr(module, "compile_subgraph_reason", None), "graph_break", False))


def latest_break() -> str:
    """Where and why Dynamo broke a graph for the first time of this kind, the latest one.

    One line; empty if it never did.
    """
    text = next(reversed(counters["graph_break"]), "")
    context = re.search(r"debug context: (.+)", text)
    parts = [text.partition("\n")[0], context[1] if context else ""]
    return ": ".join(re.sub(r" at 0x\w+", "", part) for part in parts if part)


def is_last_variant() -> bool:
    """Whether Dynamo will compile no other variant of the function that it is compiling now."""
    current = CompileContext.current_compile_id()
    number = None if current is None else current.frame_compile_id
    return number is not None and number + 1 >= dynamo_config.recompile_limit


def forget_compiled() -> None:
    """Drop every compiled graph, and set Dynamo's counters back to zero."""
    torch.compiler.reset()
    counters.clear()


def default_backend() -> str | Callable[..., Any] | None:
    """What `torch.compile` uses where it is given no backend; None: this torch cannot change it.

    torch 2.13 was the first that can. A debug switch, the environment variable
    TORCH_COMPILE_OVERRIDE_BACKENDS=">=0:specdiff", counts, too.
    """
    if "specdiff" in getattr(dynamo_config, "debug_backend_override", ""):
        return "specdiff"
    found = getattr(torch.compiler, "get_default_backend", None)
    return None if found is None else found()


def set_default_backend(backend: Callable[..., Any]) -> None:
    """Make `torch.compile` use `backend` where it is given none; only where `default_backend`."""
    torch.compiler.set_default_backend(backend)


def is_restart(error: BaseException) -> bool:
    """Whether an exception is Dynamo's own control flow, which must reach Dynamo."""
    return isinstance(error, TorchDynamoException)
