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
    """Inputs and the outputs shaped like them, best match first; none has two partners.

    `states[i]` says whether input i is a parameter or buffer of the model. Raises Unsupported if
    there is no match.
    """
    candidates = [
        (found.shared is None, plan.carries(node), found)
        for output, value in enumerate(plan.axes.results())
        for i, node in enumerate(placeholders)
        if is_tensor(value) and is_tensor(node) and not states[i]
        for found in _match(plan, (i, node), (output, value))
    ]
    if not candidates:
        raise Unsupported("no input has the shape of an output, so none is known to be denoised")
    # a condition may have the latent's shape too: prefer what carries the prunable tokens
    pairs: list[Denoised] = []
    for _, _, found in sorted(candidates, key=lambda c: c[:2], reverse=True):
        if all(found.latent != p.latent and found.velocity != p.velocity for p in pairs):
            pairs.append(found)
    main = pairs[0]
    return (main, *(p for p in pairs[1:] if p.shared is None))


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
    if len(differing) == 1 and differing[0] > 0 and len(here) > 2 and not tokens:
        axis = differing[0]
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
