"""Signature: what the runtime must know of a plan: inputs by role, segments, caches, outputs."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import fx

from specdiff.passes.axes import ClassId
from specdiff.passes.base import Unsupported
from specdiff.passes.rules.attention import ATTENTION, Attention
from specdiff.passes.rules.registry import is_tensor, shape_of
from specdiff.passes.selective import SelectivePlan, cache_shape
from specdiff.program import CacheSlot, InputRole, InputSpec, Segment, Signature

TIME_NAMES = ("timestep", "timesteps", "t")


def short_name(source: str) -> str:
    """The last identifier of a Dynamo source: `L['kwargs']['timestep']` is `timestep`."""
    words = re.findall(r"[A-Za-z_]\w*", source)
    return words[-1] if words else source


def module_path(node: fx.Node) -> str:
    """Where in the model a node was traced, e.g. `transformer_blocks.0.attn`."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return ""
    path = re.sub(r"\.?__dict__|\['_modules'\]|\._modules", "", str(stack[-1][0]))
    path = re.sub(r"\['(\w+)'\]", r".\1", path)
    return re.sub(r"^L\.self\.?|^L\.|^self\.", "", path)


def build_signature(
    plan: SelectivePlan, states: Sequence[bool], timestep_arg: str | None
) -> Signature:
    """`states[i]` says whether input i is a parameter or buffer of the model.

    Raises Unsupported if no input is denoised, i.e. has the shape of an output.
    """
    graph = plan.axes.graph
    placeholders = graph.find_nodes(op="placeholder")
    velocity, latent = _find_latent(plan, placeholders, states)
    time = _find_time(placeholders, states, timestep_arg)
    roles: dict[int, InputRole] = {latent: "latent"}
    if time is not None:
        roles[time] = "time"
    inputs = tuple(
        InputSpec(
            i, str(node.meta["source"]), "parameter" if states[i] else roles.get(i, "condition")
        )
        for i, node in enumerate(placeholders)
    )
    return Signature(
        inputs=inputs,
        segments=tuple(_segment(plan, s, placeholders, states) for s in plan.axes.segments),
        caches=tuple(_cache(plan, node) for node in plan.cached),
        tokens=_tokens(plan),
        latent=latent,
        time=time,
        velocity=velocity,
    )


def _find_latent(
    plan: SelectivePlan, placeholders: Sequence[fx.Node], states: Sequence[bool]
) -> tuple[int, int]:
    candidates = [
        (output, i, node)
        for output, value in enumerate(plan.axes.results())
        for i, node in enumerate(placeholders)
        if not states[i]
        and is_tensor(value)
        and is_tensor(node)
        and node.meta["val"].is_floating_point()
        and shape_of(node) == shape_of(value)
    ]
    if not candidates:
        raise Unsupported("no input has the shape of an output, so none is known to be denoised")
    # a condition may have the latent's shape too: prefer what carries the prunable tokens
    output, index, _ = max(candidates, key=lambda c: plan.carries(c[2]))
    return output, index


def _find_time(
    placeholders: Sequence[fx.Node], states: Sequence[bool], timestep_arg: str | None
) -> int | None:
    wanted = TIME_NAMES if timestep_arg is None else (timestep_arg,)
    for i, node in enumerate(placeholders):
        if not states[i] and is_tensor(node) and short_name(str(node.meta["source"])) in wanted:
            return i
    return None


def _segment(
    plan: SelectivePlan,
    segment: ClassId,
    placeholders: Sequence[fx.Node],
    states: Sequence[bool],
) -> Segment:
    axes = plan.axes
    carriers = [
        node
        for node, state in zip(placeholders, states, strict=True)
        if not state and axes.axes_with(node, segment) and axes.batch_axis(node) is not None
    ]
    if carriers:
        name = short_name(str(carriers[0].meta["source"]))
    else:
        first = next(n for n in axes.graph.nodes if axes.axes_with(n, segment))
        name = module_path(first) or first.name
    return Segment(name, axes.classes.size(segment), segment == plan.prunable)


def _cache(plan: SelectivePlan, node: fx.Node) -> CacheSlot:
    value: torch.Tensor = node.meta["val"]
    return CacheSlot(cache_name(node), cache_shape(plan, node), value.dtype, value.device)


def cache_name(node: fx.Node) -> str:
    """Module path and what reads it, e.g. `transformer_blocks.0.attn.key`."""
    for user in node.users:
        if user.target is ATTENTION:
            kind = "key" if Attention.of(user).key is node else "value"
            return f"{module_path(user) or user.name}.{kind}"
    return f"{module_path(node) or 'graph'}.{node.name}"


def _tokens(plan: SelectivePlan) -> CacheSlot:
    value: torch.Tensor = plan.slot.meta["val"]
    batch, tokens, *rest = cache_shape(plan, plan.slot)
    channels = 1
    for size in rest:
        channels *= size
    return CacheSlot("tokens", (batch, tokens, channels), value.dtype, value.device)
