"""Patch: what hangs on a clone of the model patcher, and on nothing else.

    SAMPLER_SAMPLE     a run begins; it goes into the options of that run, and ends with it
    PREDICT_NOISE      one evaluation of the sampler, guidance and all
    CALC_COND_BATCH    the model's answers for lists of conditions: computed, or forecast

A forecast takes the place of whatever answers the conditions: batched or one by one, areas, masks,
ControlNet, hooks, compiled or not. What follows it stays ComfyUI's: guidance, its patches, masks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from specdiff.integrations.comfyui.run import Run
from specdiff.integrations.comfyui.steps import steps_of
from specdiff.options import Options
from specdiff.settings import Settings

logger = logging.getLogger(__name__)

KEY = "specdiff"
"""Of our wrappers on a patcher, and of the run among the options of a run."""
SAMPLER_SAMPLE, PREDICT_NOISE, CALC_COND_BATCH = (
    "sampler_sample",
    "predict_noise",
    "calc_cond_batch",
)
"""Names of `comfy.patcher_extension.WrappersMP`."""


def patched(model: Any, **options: Any) -> Any:
    """A clone of a `ModelPatcher` whose runs follow a plan; the model itself stays untouched.

    Args:
        model: the patcher. A plan that it had is replaced.
        options: `quality` or `plan`, and others of `specdiff.configure`.

    Raises:
        OptionError: an unknown option or a value out of range.
    """
    settings = Options.parse(options, frozenset())[0].resolve()
    clone = model.clone()
    wrappers = {
        SAMPLER_SAMPLE: partial(_sample, settings),
        PREDICT_NOISE: _predict,
        CALC_COND_BATCH: _answer,
    }
    for kind, wrapper in wrappers.items():
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


def _sample(
    settings: Settings,
    executor: Any,
    guider: Any,
    sigmas: Tensor,
    extra_args: dict[str, Any],
    callback: Any,
    noise: Tensor,
    latent_image: Tensor | None = None,
    denoise_mask: Tensor | None = None,
    *rest: Any,
    **more: Any,
) -> Any:
    """One run of a sampler, and a line in the log of what became of the plan."""
    options = extra_args["model_options"]
    schedule = options.get("transformer_options", {}).get("sample_sigmas", sigmas)
    sampler = executor.class_obj
    steps = steps_of(sampler, guider, schedule)
    run = Run(settings, schedule.tolist(), _name_of(sampler), steps, denoise_mask)
    args = (guider, sigmas, {**extra_args, "model_options": {**options, KEY: run}}, callback, noise)
    try:
        return executor(*args, latent_image, denoise_mask, *rest, **more)
    finally:
        logger.info("specdiff: %s", run.summary())


def _predict(
    executor: Any, x: Tensor, timestep: Tensor, model_options: Any = None, *rest: Any, **more: Any
) -> Tensor:
    """One evaluation."""
    options = model_options or {}
    compute: Callable[[], Tensor] = partial(executor, x, timestep, options, *rest, **more)
    run = _run_of(options)
    return compute() if run is None else run.evaluate(x, timestep, compute)


def _answer(
    executor: Any, model: Any, conds: Any, x_in: Tensor, timestep: Tensor, model_options: Any
) -> list[Tensor]:
    """What the model says to each list of conditions."""
    compute = partial(executor, model, conds, x_in, timestep, model_options)
    run = _run_of(model_options)
    return list(compute() if run is None else run.answer(conds, x_in, compute))


def _name_of(sampler: Any) -> str:
    function = getattr(sampler, "sampler_function", sampler)
    name: str = getattr(function, "__name__", type(function).__name__)
    return name.removeprefix("sample_")


def _run_of(options: Mapping[str, Any]) -> Run | None:
    run = options.get(KEY)
    return run if isinstance(run, Run) else None
