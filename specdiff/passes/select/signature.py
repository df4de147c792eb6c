"""Signature: what the runtime must know of a graph: inputs by role, segments, caches, outputs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import fx

from specdiff.passes.rules.attention import ATTENTION, Attention
from specdiff.passes.rules.registry import is_tensor
from specdiff.passes.rules.shape import VIEWS
from specdiff.passes.select.axes import ClassId
from specdiff.passes.select.cache_layout import stored_tensors
from specdiff.passes.select.input_roles import (
    VaryingInputs,
    find_denoised,
    find_time,
    is_scalar,
    short_name,
)
from specdiff.passes.select.selection import Selection
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
"""Ops that move numbers without changing them."""


def module_path(node: fx.Node) -> str:
    """Where in the model a node was traced, e.g. `transformer_blocks.0.attn`."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return ""
    path = re.sub(r"\.?__dict__|\['_modules'\]|\._modules", "", str(stack[-1][0]))
    path = re.sub(r"\['(\w+)'\]", r".\1", path)
    return re.sub(r"^L\.self\.?|^L\.|^self\.", "", path)


def build_signature(
    selection: Selection, is_state: Sequence[bool], timestep_arg: str | None
) -> Signature:
    """The signature of a graph with this selection.

    `is_state[i]` says whether input i is a parameter or buffer of the model. Raises Unsupported if
    no input has the shape of an output, so that none is known to be denoised.
    """
    graph = selection.axes.graph
    placeholders = graph.find_nodes(op="placeholder")
    denoised = find_denoised(selection, placeholders, is_state)
    time = find_time(placeholders, is_state, timestep_arg)
    roles = _roles(selection, denoised, time)
    inputs = tuple(
        InputSpec(
            i, str(node.meta["source"]), "parameter" if is_state[i] else roles.get(i, "condition")
        )
        for i, node in enumerate(placeholders)
    )
    return Signature(
        inputs=inputs,
        segments=tuple(
            _segment(selection, s, placeholders, is_state) for s in selection.axes.segments
        ),
        caches=cache_slots(selection),
        tokens=_tokens(selection),
        lengths=selection.lengths,
        denoised=denoised,
        time=time,
        additive=_is_additive(selection, denoised),
        tabulated_from=_tabulated_from(selection, inputs),
    )


def _tabulated_from(selection: Selection, inputs: Sequence[InputSpec]) -> TableSources | None:
    if selection.timetable is None:
        return None
    placeholders = selection.axes.graph.find_nodes(op="placeholder")
    made_of = [s for s in inputs if placeholders[s.index] in selection.timetable.leaves]
    return TableSources(
        tuple(spec.index for spec in made_of if spec.role == "scalar"),
        tuple(spec.index for spec in made_of if spec.role == "parameter"),
    )


def _is_additive(selection: Selection, denoised: Sequence[Denoised]) -> bool:
    """Whether the tail only rearranges numbers, and all of its outputs move latents."""
    pairs = {pair.velocity: pair for pair in denoised}
    values = {i: v for i, v in enumerate(selection.axes.results()) if is_tensor(v)}
    if pairs.keys() != values.keys():
        return False
    if not all(pair.is_all_of(values[i].meta["val"]) for i, pair in pairs.items()):
        return False
    carried = set(selection.slots)
    for node in selection.tail:
        if carried.intersection(node.all_input_nodes):
            carried.add(node)
            if node.target not in REARRANGEMENTS:
                return False
    return True


def varying_inputs(
    selection: Selection, is_state: Sequence[bool], timestep_arg: str | None
) -> VaryingInputs:
    """The inputs that may change from step to step: time, other scalars, latents."""
    placeholders = selection.axes.graph.find_nodes(op="placeholder")
    denoised = find_denoised(selection, placeholders, is_state)
    roles = _roles(selection, denoised, find_time(placeholders, is_state, timestep_arg))
    by_role: dict[InputRole, list[fx.Node]] = defaultdict(list)
    for i, node in enumerate(placeholders):
        if i in roles and not is_state[i]:
            by_role[roles[i]].append(node)
    time = by_role["time"][0] if by_role["time"] else None
    return VaryingInputs(time, tuple(by_role["scalar"]), tuple(by_role["latent"]))


def _roles(
    selection: Selection, denoised: Sequence[Denoised], time: int | None
) -> dict[int, InputRole]:
    """Roles by input, of those that are neither parameters nor conditions."""
    placeholders = selection.axes.graph.find_nodes(op="placeholder")
    roles: dict[int, InputRole] = {
        i: "scalar" for i, node in enumerate(placeholders) if is_scalar(selection, node)
    }
    roles.update((pair.latent, "latent") for pair in denoised)
    if time is not None:
        roles[time] = "time"
    return roles


def _segment(
    selection: Selection,
    segment: ClassId,
    placeholders: Sequence[fx.Node],
    is_state: Sequence[bool],
) -> Segment:
    axes = selection.axes
    carriers = [
        node
        for node, state in zip(placeholders, is_state, strict=True)
        if not state and axes.axes_with(node, segment) and axes.batch_axis(node) is not None
    ]
    if carriers:
        name = short_name(str(carriers[0].meta["source"]))
    else:
        first = next(n for n in axes.graph.nodes if axes.axes_with(n, segment))
        name = module_path(first) or first.name
    return Segment(name, axes.classes.size(segment), segment in selection.prunable)


def cache_slots(selection: Selection) -> tuple[CacheSlot, ...]:
    """The tensors that a selection stores between steps."""
    return tuple(
        CacheSlot(cache_name(node) + t.suffix, t.shape, t.dtype, node.meta["val"].device)
        for node, tensors in stored_tensors(selection).items()
        for t in tensors
    )


def cache_name(node: fx.Node) -> str:
    """Module path and use of a cached value, e.g. `transformer_blocks.0.attn.key`."""
    for user in node.users:
        if user.target is ATTENTION:
            kind = "key" if Attention.of(user).key is node else "value"
            return f"{module_path(user) or user.name}.{kind}"
    return f"{module_path(node) or 'graph'}.{node.name}"


def _tokens(selection: Selection) -> CacheSlot:
    value: torch.Tensor = selection.slots[0].meta["val"]
    batch = selection.cache_shape(selection.slots[0])[0]
    return CacheSlot(
        "tokens", (batch, selection.tokens, selection.channels), value.dtype, value.device
    )
