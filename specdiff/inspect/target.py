"""Target: a model and one call of it, named on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from specdiff.errors import SpecdiffError
from specdiff.inspect.explaining import explain
from specdiff.inspect.report import Report
from specdiff.models.named import function_named

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
    return returned_call(target, function_named(target)())


def returned_call(target: str, returned: object) -> ModelCall:
    """What the function of that name returned: a model, and its inputs by name.

    Raises:
        SpecdiffError: It is something else.
    """
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise SpecdiffError(f"{target}: must return a model and a dict of its inputs")
    model, inputs = returned
    if not isinstance(model, nn.Module) or not isinstance(inputs, Mapping):
        kinds = f"{type(model).__name__} and {type(inputs).__name__}"
        raise SpecdiffError(f"{target}: must return a torch module and a dict, not {kinds}")
    return ModelCall(type(model).__name__, model, inputs)


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
