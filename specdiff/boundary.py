"""Boundary: what forecasting whole steps needs of a model, found from one call of it.

Which input is the latent, which the time, which output predicts how the latent moves. Nothing else:
no attention, no tokens, no graph.

    inputs   hidden_states [2, 16, 64, 64], encoder_hidden_states [2, 77, 768], timestep [2]
    outputs  [2, 16, 64, 64]
    found    latent hidden_states, moved by output 0; time timestep; the rest are conditions
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdiff.errors import Unsupported
from specdiff.program import CacheSlot, Denoised, InputRole, InputSpec, Signature, time_rank

LATENT_NAMES = ("hidden_states", "x", "sample", "latents", "latent", "img", "noisy_latents")
"""Where several inputs have the shape of an output, these names come first, in this order."""


@dataclass(frozen=True)
class Leaf:
    """One flat input: a tensor, real or fake, or any other value."""

    name: str
    """Of the argument that it belongs to."""
    value: object
    is_state: bool = False
    """Whether it is a parameter or buffer of the model."""
    in_list: bool = False
    """Whether it is an item of a list."""


def step_signature(
    leaves: Sequence[Leaf], outputs: Sequence[object], timestep_arg: str | None, unselectable: str
) -> Signature:
    """The signature of a model of which nothing but the boundary is known.

    Its token-level output [B, 1, n] is all that moves a latent: one token a sample, or [1, 1, n]
    where outputs have no batch in common.

    Args:
        leaves: the flat inputs.
        outputs: the flat outputs.
        timestep_arg: name of the time, None for the usual ones.
        unselectable: why no tokens can be selected.

    Raises:
        Unsupported: no time, or no output that moves an input.
    """
    time = _time(leaves, timestep_arg)
    denoised = _denoised(leaves, outputs)
    velocities = [value for pair in denoised if isinstance(value := outputs[pair.velocity], Tensor)]
    listed = all(leaves[pair.latent].in_list for pair in denoised)
    apart = listed and len({velocity.shape for velocity in velocities}) == 1
    batch = len(velocities) if apart else 1 if listed else _common_batch(velocities)
    size = sum(velocity.numel() for velocity in velocities) // batch
    dtype = velocities[0].dtype
    for velocity in velocities[1:]:
        dtype = torch.promote_types(dtype, velocity.dtype)
    roles: dict[int, InputRole] = {
        i: "scalar" for i, leaf in enumerate(leaves) if is_scalar(leaf.value, batch)
    }
    roles.update((pair.latent, "latent") for pair in denoised)
    roles[time] = "time"
    roles.update((i, "parameter") for i, leaf in enumerate(leaves) if leaf.is_state)
    return Signature(
        inputs=tuple(
            InputSpec(i, leaf.name, roles.get(i, "condition")) for i, leaf in enumerate(leaves)
        ),
        segments=(),
        caches=(),
        tokens=CacheSlot("tokens", (batch, 1, size), dtype, velocities[0].device),
        lengths=(1,),
        denoised=denoised,
        time=time,
        additive=all(
            pair.is_all_of(velocity) for pair, velocity in zip(denoised, velocities, strict=True)
        ),
        samples_apart=apart and len(velocities) > 1,
        unselectable=unselectable,
    )


def _common_batch(velocities: Sequence[Tensor]) -> int:
    batches = {len(velocity) for velocity in velocities}
    return batches.pop() if len(batches) == 1 else 1


def _time(leaves: Sequence[Leaf], timestep_arg: str | None) -> int:
    """The input that holds numbers and whose name is surest."""
    ranks = [
        (rank, i)
        for i, leaf in enumerate(leaves)
        if not leaf.is_state and _is_number(leaf.value)
        if (rank := time_rank(leaf.name, timestep_arg)) is not None
    ]
    if not ranks:
        raise Unsupported("no time input was found: name it by the option timestep_arg")
    return min(ranks)[1]


def _denoised(leaves: Sequence[Leaf], outputs: Sequence[object]) -> tuple[Denoised, ...]:
    """Each output with the input that it moves, in the order of the outputs."""
    pairs: list[Denoised] = []
    for output, value in enumerate(outputs):
        taken = {pair.latent for pair in pairs}
        matches = [
            (match.shared is not None, match.packed, _rank(leaf.name), i, match)
            for i, leaf in enumerate(leaves)
            if i not in taken and (match := _match((i, leaf), (output, value))) is not None
        ]
        if matches:
            pairs.append(min(matches, key=lambda each: each[:-1])[-1])
    if not pairs:
        raise Unsupported("no input has the shape of an output, so none is known to be denoised")
    return tuple(pairs)


def _match(latent: tuple[int, Leaf], velocity: tuple[int, object]) -> Denoised | None:
    (index, leaf), (output, value) = latent, velocity
    if leaf.is_state or "cache" in leaf.name or not (_is_float(leaf.value) and _is_float(value)):
        return None
    assert isinstance(leaf.value, Tensor) and isinstance(value, Tensor)
    here, there = leaf.value.shape, value.shape
    match = Denoised.match(index, here, output, there)
    if match is None and leaf.name in LATENT_NAMES and _has_more_tokens(there, here):
        return Denoised(index, output, (1, here[1]), packed=True)
    return match


def _has_more_tokens(packed: Sequence[int], latent: Sequence[int]) -> bool:
    """Whether an output is text and image [B, T + N, C] in one, of which the image is denoised."""
    sequences = len(packed) == len(latent) == 3
    return sequences and packed[::2] == latent[::2] and packed[1] > latent[1]


def _rank(name: str) -> int:
    return LATENT_NAMES.index(name) if name in LATENT_NAMES else len(LATENT_NAMES)


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return not value.is_complex() and value.dtype is not torch.bool
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_scalar(value: object, batch: int) -> bool:
    """Whether it is a float with at most one number a sample."""
    if isinstance(value, Tensor):
        return value.is_floating_point() and value.numel() <= batch
    return isinstance(value, float)
