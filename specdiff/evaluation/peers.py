"""The caches of diffusers and cache-dit, at recommended settings, compiled as far as they allow.

Blocks are compiled before a cache puts its hooks around them; for a cache that works inside blocks,
their attention and MLP modules are. The hooks run eagerly (`torch.compiler.disable`), as they would
recompile at every step. This is faster than what their documentation asks for. Where a library
refuses the model, its own words are the reason.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from specdiff.evaluation.method import Candidate, Prepared, Refused
from specdiff.models.subject import STEPS, Request, Subject

CALIBRATION_SEED = 9_000
"""Far from the seeds of the measured pictures."""
Enable = Callable[[Any], None]
STACKS = ("transformer_blocks", "single_transformer_blocks", "blocks")
"""Names under which transformers hold their blocks."""


def compile_blocks(transformer: Any) -> None:
    """Compile the forward of each transformer block, in one graph each."""
    for stack in STACKS:
        for block in getattr(transformer, stack, ()):
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)


def compile_parts(transformer: Any) -> None:
    """Compile the forward of what lies inside the blocks: attentions, MLPs, norms, projections."""
    for stack in STACKS:
        for block in getattr(transformer, stack, ()):
            for part in block.children():
                part.forward = torch.compile(part.forward, fullgraph=True, dynamic=False)


COVERS: Mapping[str, Callable[[Any], None]] = {"blocks": compile_blocks, "parts": compile_parts}


def _peer(
    name: str, family: str, settings: Mapping[str, Any], covers: str, on: Enable
) -> Candidate:
    def eager(pipeline: Any) -> Any:
        on(pipeline)
        return pipeline

    def prepare(pipeline: Any) -> Prepared:
        COVERS[covers](pipeline.transformer)
        return Prepared(eager(pipeline), covers)

    return Candidate(name, family, STEPS, settings, prepare, eager, is_peer=True)


def _enable(pipeline: Any, config: Any) -> None:
    """Let diffusers put its hooks around the transformer."""
    transformer = pipeline.transformer
    if not hasattr(transformer, "enable_cache"):
        kind = type(transformer).__name__
        raise Refused(f"diffusers: {kind} has no enable_cache (it is no CacheMixin)")
    try:
        transformer.enable_cache(config)
    except ValueError as error:
        raise Refused(f"diffusers: {error}") from error


def first_block_cache() -> Iterator[Candidate]:
    """Skips all blocks but the first while that one's residual changes little (default 0.05)."""
    from diffusers import FirstBlockCacheConfig

    for threshold in (0.05, 0.1, 0.2, 0.3):

        def on(pipeline: Any, threshold: float = threshold) -> None:
            _enable(pipeline, FirstBlockCacheConfig(threshold=threshold))

        settings = {"threshold": threshold}
        yield _peer(f"FirstBlockCache {threshold}", "FirstBlockCache", settings, "blocks", on)


def taylorseer() -> Iterator[Candidate]:
    """Extrapolates module outputs (default: every 5, order 1); lite: the model's output alone."""
    from diffusers import TaylorSeerCacheConfig

    for interval, order, is_lite in ((5, 1, False), (2, 1, True), (3, 1, True), (5, 1, True)):
        settings: dict[str, Any] = {
            "cache_interval": interval,
            "max_order": order,
            "use_lite_mode": is_lite,
        }

        def on(pipeline: Any, settings: dict[str, Any] = settings) -> None:
            dtype = pipeline.transformer.dtype  # its default, bfloat16, costs it fidelity here
            _enable(pipeline, TaylorSeerCacheConfig(**settings, taylor_factors_dtype=dtype))

        name = f"TaylorSeer{' lite' * is_lite} {interval}/{order}"
        yield _peer(name, "TaylorSeer", settings, "blocks" if is_lite else "parts", on)


def mag_cache(subject: Subject) -> Iterator[Candidate]:
    """Skips steps while the accumulated magnitude of the residual is trusted (default 0.06)."""
    from diffusers import MagCacheConfig

    ratios: list[float] = []

    def calibrate() -> list[float]:
        if not ratios:
            pipeline = subject.load()
            _enable(pipeline, MagCacheConfig(calibrate=True, num_inference_steps=STEPS))
            printed = io.StringIO()  # the calibration only prints its result
            with contextlib.redirect_stdout(printed):
                subject.draw(pipeline, Request(subject.prompts[0], CALIBRATION_SEED))
            line = next(line for line in printed.getvalue().splitlines() if line[:2] == "[1")
            ratios.extend(ast.literal_eval(line))
        return ratios

    for threshold in (0.03, 0.06, 0.12, 0.24):

        def on(pipeline: Any, threshold: float = threshold) -> None:
            calibrated = calibrate()
            config = MagCacheConfig(
                threshold=threshold, num_inference_steps=STEPS, mag_ratios=calibrated
            )
            _enable(pipeline, config)

        settings = {"threshold": threshold, "mag_ratios": "calibrated on this model"}
        yield _peer(f"MagCache {threshold}", "MagCache", settings, "blocks", on)


def sea_cache() -> Iterator[Candidate]:
    """Skips steps by a filtered distance of the latents (default 0.25)."""
    from diffusers import SeaCacheConfig

    for threshold in (0.1, 0.25, 0.5, 1.0):

        def on(pipeline: Any, threshold: float = threshold) -> None:
            config = SeaCacheConfig(threshold=threshold, raw_vision_callback=_latent_frames)
            _enable(pipeline, config)
            _announce_steps(pipeline)

        yield _peer(f"SeaCache {threshold}", "SeaCache", {"threshold": threshold}, "blocks", on)


def _latent_frames(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The latents as SeaCache wants them: one `(C, frames, rows, columns)` a sample."""
    latents: Tensor = kwargs["hidden_states"]
    if latents.dim() == 5:
        return list(latents)
    side = math.isqrt(latents.shape[1])
    return [one.T.reshape(-1, 1, side, side) for one in latents]


def _announce_steps(pipeline: Any) -> None:
    """Give SeaCache the step; pipelines of diffusers 0.42 do so only for SeaCache's own models."""
    transformer, scheduler = pipeline.transformer, pipeline.scheduler
    context = transformer.cache_context

    def announced(name: str) -> Any:
        index = scheduler.step_index or 0
        sigma, count = float(scheduler.sigmas[index]), len(scheduler.timesteps)
        return context(name, step_index=index, sigma=sigma, num_inference_steps=count)

    transformer.cache_context = announced


def pyramid_attention_broadcast() -> Iterator[Candidate]:
    """Reuses attention outputs in the middle of the run (default: every 2)."""
    from diffusers import PyramidAttentionBroadcastConfig

    for every in (2, 3, 4):

        def on(pipeline: Any, every: int = every) -> None:
            config = PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=every,
                current_timestep_callback=lambda: pipeline.current_timestep,
            )
            _enable(pipeline, config)

        name = f"PyramidAttentionBroadcast {every}"
        settings = {"spatial_attention_block_skip_range": every}
        yield _peer(name, "PyramidAttentionBroadcast", settings, "parts", on)


def faster_cache(subject: Subject) -> Iterator[Candidate]:
    """Blends old attention outputs; skips the unconditional half where there is one."""
    from diffusers import FasterCacheConfig

    for every in (2, 3, 4):

        def on(pipeline: Any, every: int = every) -> None:
            config = FasterCacheConfig(
                spatial_attention_block_skip_range=every,
                tensor_format="BCHW",
                is_guidance_distilled="guidance_scale" not in subject.options,
                current_timestep_callback=lambda: pipeline.current_timestep,
            )
            _enable(pipeline, config)

        settings = {"spatial_attention_block_skip_range": every}
        yield _peer(f"FasterCache {every}", "FasterCache", settings, "parts", on)


def cache_dit(order: int) -> Iterator[Candidate]:
    """DBCache on the first block's residual, with or without TaylorSeer's extrapolation.

    Its defaults are a threshold of 0.08 after 8 warm-up steps; the faster settings warm up for 4.
    """
    family = "cache-dit DBCache" + f" + TaylorSeer {order}" * bool(order)
    for threshold, warm_up in ((0.08, 8), (0.16, 8), (0.16, 4), (0.24, 4), (0.4, 4)):

        def on(pipeline: Any, threshold: float = threshold, warm_up: int = warm_up) -> None:
            if importlib.util.find_spec("cache_dit") is None:
                raise Refused("cache-dit is not installed: pip install specdiff[peers]")
            import cache_dit as library

            # Its default of 8 blocks before the test refuses models with no more than that.
            config = library.DBCacheConfig(
                Fn_compute_blocks=1,
                Bn_compute_blocks=0,
                max_warmup_steps=warm_up,
                residual_diff_threshold=threshold,
            )
            extra = {}
            if order:
                chosen = library.TaylorSeerCalibratorConfig(taylorseer_order=order)
                extra["calibrator_config"] = chosen
            library.enable_cache(pipeline, cache_config=config, **extra)

        settings = {
            "residual_diff_threshold": threshold,
            "max_warmup_steps": warm_up,
            "Fn_compute_blocks": 1,
            "taylorseer_order": order,
        }
        yield _peer(f"{family} {threshold}/{warm_up}", family, settings, "blocks", on)


def peers(subject: Subject) -> list[Candidate]:
    """Each of these caches at three or more settings."""
    return [
        *first_block_cache(),
        *taylorseer(),
        *mag_cache(subject),
        *sea_cache(),
        *faster_cache(subject),
        *pyramid_attention_broadcast(),
        *cache_dit(0),
        *cache_dit(1),
    ]
