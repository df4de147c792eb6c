"""Roles: which input of a graph is denoised, by which output, and which input is the time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import fx

from specdiff.passes.base import Unsupported
from specdiff.passes.rules.registry import is_tensor, shape_of
from specdiff.passes.selective import SelectivePlan
from specdiff.program import Denoised

TIME_NAMES = ("timestep", "timesteps", "t")


def find_denoised(
    plan: SelectivePlan, placeholders: Sequence[fx.Node], states: Sequence[bool]
) -> tuple[Denoised, ...]:
    """Outputs and the inputs shaped like them, in the order of the outputs.

    `states[i]` says whether input i is a parameter or buffer of the model. Raises Unsupported if
    there is no match.
    """
    pairs: list[Denoised] = []
    for output, value in enumerate(plan.axes.results()):
        taken = {pair.latent for pair in pairs}
        matches = [
            (plan.carries(node), -i, found)
            for i, node in enumerate(placeholders)
            if is_tensor(value) and is_tensor(node) and not states[i] and i not in taken
            for found in _match(plan, (i, node), (output, value))
        ]
        if matches:
            # a condition may have such a shape too, but is used later; or carries no tokens
            pairs.append(max(matches, key=lambda match: match[:2])[2])
    if not pairs:
        raise Unsupported("no input has the shape of an output, so none is known to be denoised")
    return tuple(pairs)


def is_scalar(plan: SelectivePlan, node: fx.Node) -> bool:
    """Whether an input is a float with at most one number a sample."""
    if not is_tensor(node):
        return isinstance(node.meta.get("val"), float)
    value = node.meta["val"]
    samples = plan.axes.classes.size(plan.axes.batch)
    return bool(value.is_floating_point() and value.numel() <= samples)


def _match(
    plan: SelectivePlan, latent: tuple[int, fx.Node], velocity: tuple[int, fx.Node]
) -> Iterator[Denoised]:
    """At most one."""
    here, there = shape_of(latent[1]), shape_of(velocity[1])
    if not latent[1].meta["val"].is_floating_point() or len(here) != len(there):
        return
    differing = [axis for axis in range(len(here)) if here[axis] != there[axis]]
    if not differing:
        yield Denoised(latent[0], velocity[0], None)
        return
    tokens = any(
        plan.axes.axes_with(node, segment) == differing
        for node in (latent[1], velocity[1])
        for segment in plan.axes.segments
    )
    if len(differing) != 1 or differing[0] == 0 or len(here) < 3 or tokens:
        return
    axis = differing[0]
    # a latent with conditions is wider than its prediction, one with learned variance half as wide
    if here[axis] > there[axis] or 2 * here[axis] == there[axis]:
        yield Denoised(latent[0], velocity[0], (axis, min(here[axis], there[axis])))


def find_time(
    placeholders: Sequence[fx.Node], states: Sequence[bool], timestep_arg: str | None
) -> int | None:
    """The input that is named like a time, or as the option says."""
    wanted = TIME_NAMES if timestep_arg is None else (timestep_arg,)
    for i, node in enumerate(placeholders):
        if not states[i] and is_tensor(node) and short_name(str(node.meta["source"])) in wanted:
            return i
    return None


def short_name(source: str) -> str:
    """The last identifier of a Dynamo source: `L['kwargs']['timestep']` is `timestep`."""
    words = re.findall(r"[A-Za-z_]\w*", source)
    return words[-1] if words else source
