"""Target: a model and one call of it, named on the command line."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from specdiff.errors import SpecdiffError
from specdiff.inspect.explaining import explain
from specdiff.inspect.report import Report

DEMO = "demo"


@dataclass(frozen=True)
class ModelCall:
    """A model and the inputs of one forward."""

    name: str
    model: nn.Module
    inputs: Mapping[str, Any]


def load_target(target: str, device: torch.device) -> ModelCall:
    """The demo model, or what a function returns: a model, and its inputs by name.

    Args:
        target: `demo`, `package.module:function` or `path/to/file.py:function`.
        device: Device of the demo model; a function chooses its own.

    Raises:
        SpecdiffError: There is no such function, or it returns something else.
    """
    if target == DEMO:
        return demo_call(device)
    function = _function(target)
    if not _takes_nothing(function):
        raise SpecdiffError(f"{target}: must be a function that needs no arguments")
    returned = function()
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise SpecdiffError(f"{target}: must return a model and a dict of its inputs")
    model, inputs = returned
    if not isinstance(model, nn.Module) or not isinstance(inputs, Mapping):
        kinds = f"{type(model).__name__} and {type(inputs).__name__}"
        raise SpecdiffError(f"{target}: must return a torch module and a dict, not {kinds}")
    return ModelCall(type(model).__name__, model, inputs)


def _function(target: str) -> Callable[[], Any]:
    origin, separator, name = target.rpartition(":")
    if not separator or not origin or not name:
        raise SpecdiffError(
            f"{target!r}: expected demo, package.module:function or file.py:function"
        )
    try:
        module = _from_file(Path(origin)) if origin.endswith(".py") else _by_name(origin)
    except (ImportError, OSError) as error:
        raise SpecdiffError(f"cannot import {origin}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise SpecdiffError(f"{origin} has no function {name}")
    checked: Callable[[], Any] = function
    return checked


def _takes_nothing(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError):  # the latter of built-in functions that do not say
        return False
    return True


def _by_name(name: str) -> Any:
    if "" not in sys.path:  # a console script does not look where it was called
        sys.path.insert(0, "")
    return importlib.import_module(name)


def _from_file(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def explain_call(call: ModelCall, options: Mapping[str, Any]) -> Report:
    """What `specdiff.explain` says of a call.

    Raises:
        OptionError: An unknown option or a value out of range.
        SpecdiffError: The model does not run on these inputs.
    """
    try:
        return explain(call.model, options=options, **call.inputs)
    except SpecdiffError:
        raise
    except Exception:
        _require_running(call)
        raise


@torch.no_grad()
def _require_running(call: ModelCall) -> None:
    try:
        call.model(**call.inputs)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise SpecdiffError(f"{call.name} does not run on its inputs: {reason}") from error


def demo_call(device: torch.device) -> ModelCall:
    """The demo model and its inputs at the first step of its pipeline."""
    from specdiff.models.demo import (
        PIPELINE_SIDE,
        built_in_prompts,
        load_pipeline,
        prompt_embeddings,
    )

    pipeline: Any = load_pipeline(device)
    pipeline.set_progress_bar_config(disable=True)
    calls: list[Mapping[str, Any]] = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    tokens, pooled = prompt_embeddings(built_in_prompts()[:1])
    pipeline(
        prompt_embeds=tokens.to(device),
        pooled_prompt_embeds=pooled.to(device),
        height=PIPELINE_SIDE,
        width=PIPELINE_SIDE,
        num_inference_steps=1,
        output_type="latent",
    )
    hook.remove()
    return ModelCall("the demo model", pipeline.transformer, calls[0])
