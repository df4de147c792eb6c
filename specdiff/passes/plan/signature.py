"""Signature: what the runtime must know of a plan: inputs by role, segments, caches, outputs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import fx

from specdiff.passes.plan.axes import ClassId
from specdiff.passes.plan.cache_layout import kept_tensors
from specdiff.passes.plan.input_roles import (
    VaryingInputs,
    find_denoised,
    find_time,
    is_scalar,
    short_name,
)
from specdiff.passes.plan.selective_plan import SelectivePlan
from specdiff.passes.rules.attention import ATTENTION, Attention
from specdiff.passes.rules.registry import is_tensor
from specdiff.passes.rules.shape import VIEWS
from specdiff.program import (
    CacheSlot,
    Denoised,
    InputRole,
    InputSpec,
    Segment,
    Signature,
    TableSources,
)

aten = torch.ops.aten
REARRANGEMENTS = (
    *VIEWS,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.slice.Tensor,
    aten.select.int,
    aten.cat.default,
    aten.stack.default,
    aten.clone.default,
    aten.contiguous.default,
    aten._to_copy.default,
    aten.to.dtype,
)
"""What moves numbers and leaves them what they are."""


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
    denoised = find_denoised(plan, placeholders, states)
    time = find_time(placeholders, states, timestep_arg)
    roles = _roles(plan, denoised, time)
    inputs = tuple(
        InputSpec(
            i, str(node.meta["source"]), "parameter" if states[i] else roles.get(i, "condition")
        )
        for i, node in enumerate(placeholders)
    )
    return Signature(
        inputs=inputs,
        segments=tuple(_segment(plan, s, placeholders, states) for s in plan.axes.segments),
        caches=cache_slots(plan),
        tokens=_tokens(plan),
        lengths=plan.lengths,
        denoised=denoised,
        time=time,
        additive=_is_additive(plan, denoised),
        tabulated_from=_tabulated_from(plan, inputs),
    )


def _tabulated_from(plan: SelectivePlan, inputs: Sequence[InputSpec]) -> TableSources | None:
    if plan.timetable is None:
        return None
    placeholders = plan.axes.graph.find_nodes(op="placeholder")
    made_of = [s for s in inputs if placeholders[s.index] in plan.timetable.leaves]
    return TableSources(
        tuple(spec.index for spec in made_of if spec.role == "scalar"),
        tuple(spec.index for spec in made_of if spec.role == "parameter"),
    )


def _is_additive(plan: SelectivePlan, denoised: Sequence[Denoised]) -> bool:
    """Whether the tail only rearranges, and all that it returns moves a latent."""
    pairs = {pair.velocity: pair for pair in denoised}
    values = {i: v for i, v in enumerate(plan.axes.results()) if is_tensor(v)}
    if pairs.keys() != values.keys():
        return False
    if not all(pair.is_all_of(values[i].meta["val"]) for i, pair in pairs.items()):
        return False
    carried = set(plan.slots)
    for node in plan.tail:
        if carried.intersection(node.all_input_nodes):
            carried.add(node)
            if node.target not in REARRANGEMENTS:
                return False
    return True


def varying_inputs(
    plan: SelectivePlan, states: Sequence[bool], timestep_arg: str | None
) -> VaryingInputs:
    """Inputs that may change from step to step: time and other scalars, latents."""
    placeholders = plan.axes.graph.find_nodes(op="placeholder")
    denoised = find_denoised(plan, placeholders, states)
    roles = _roles(plan, denoised, find_time(placeholders, states, timestep_arg))
    by_role: dict[InputRole, list[fx.Node]] = defaultdict(list)
    for i, node in enumerate(placeholders):
        if i in roles and not states[i]:
            by_role[roles[i]].append(node)
    time = by_role["time"][0] if by_role["time"] else None
    return VaryingInputs(time, tuple(by_role["scalar"]), tuple(by_role["latent"]))


def _roles(
    plan: SelectivePlan, denoised: Sequence[Denoised], time: int | None
) -> dict[int, InputRole]:
    """Of the inputs that are neither parameters nor conditions."""
    placeholders = plan.axes.graph.find_nodes(op="placeholder")
    roles: dict[int, InputRole] = {
        i: "scalar" for i, node in enumerate(placeholders) if is_scalar(plan, node)
    }
    roles.update((pair.latent, "latent") for pair in denoised)
    if time is not None:
        roles[time] = "time"
    return roles


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
    return Segment(name, axes.classes.size(segment), segment in plan.prunable)


def cache_slots(plan: SelectivePlan) -> tuple[CacheSlot, ...]:
    """What a plan keeps between steps."""
    return tuple(
        CacheSlot(cache_name(node) + t.suffix, t.shape, t.dtype, node.meta["val"].device)
        for node, tensors in kept_tensors(plan).items()
        for t in tensors
    )


def cache_name(node: fx.Node) -> str:
    """Module path and what reads it, e.g. `transformer_blocks.0.attn.key`."""
    for user in node.users:
        if user.target is ATTENTION:
            kind = "key" if Attention.of(user).key is node else "value"
            return f"{module_path(user) or user.name}.{kind}"
    return f"{module_path(node) or 'graph'}.{node.name}"


def _tokens(plan: SelectivePlan) -> CacheSlot:
    value: torch.Tensor = plan.slots[0].meta["val"]
    batch = plan.cache_shape(plan.slots[0])[0]
    return CacheSlot("tokens", (batch, plan.tokens, plan.channels), value.dtype, value.device)
