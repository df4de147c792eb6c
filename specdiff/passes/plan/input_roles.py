"""Roles: which input of a graph is denoised, by which output, and which input is the time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from specdiff.errors import Unsupported
from specdiff.passes.plan.selective_plan import SelectivePlan
from specdiff.passes.rules.registry import is_tensor, shape_of
from specdiff.program import Denoised, time_rank


@dataclass(frozen=True)
class VaryingInputs:
    """Inputs of a graph that may change from step to step."""

    time: fx.Node | None
    scalars: tuple[fx.Node, ...]
    """Each a number a sample, such as the strength of guidance; most change from run to run."""
    latents: tuple[fx.Node, ...]

    @property
    def all(self) -> tuple[fx.Node, ...]:
        """Every one of them."""
        return (*((self.time,) if self.time is not None else ()), *self.scalars, *self.latents)


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
            (plan.carries(node), -i, node, found)
            for i, node in enumerate(placeholders)
            if is_tensor(value) and is_tensor(node) and not states[i] and i not in taken
            if (found := _match(plan, (i, node), (output, value))) is not None
        ]
        if matches:
            pairs.append(_latent_among(matches))
    if not pairs:
        raise Unsupported("no input has the shape of an output, so none is known to be denoised")
    return tuple(pairs)


def _latent_among(matches: Sequence[tuple[bool, int, fx.Node, Denoised]]) -> Denoised:
    """A condition may have such a shape, too: it carries no tokens, or is used later.

    Or it is wider and joins the latent at once.
    """
    *_, node, best = max(matches, key=lambda match: match[:2])
    joined = [m for *_, other, m in matches if set(other.users) & set(node.users)]
    return next((m for m in joined if m.shared is None), best) if best.shared else best


def is_scalar(plan: SelectivePlan, node: fx.Node) -> bool:
    """Whether an input is a float with at most one number a sample, or a number that nothing reads.

    Dynamo makes an input of where a view begins in its storage, such as one time among all times.
    """
    if not is_tensor(node):
        return isinstance(node.meta.get("val"), float) or not node.users
    value = node.meta["val"]
    samples = plan.axes.samples
    return bool(value.is_floating_point() and value.numel() <= samples)


def _match(
    plan: SelectivePlan, latent: tuple[int, fx.Node], velocity: tuple[int, fx.Node]
) -> Denoised | None:
    node, value = latent[1], velocity[1]
    if not node.meta["val"].is_floating_point():
        return None
    found = Denoised.match(latent[0], shape_of(node), velocity[0], shape_of(value))
    if found is not None and found.shared is not None:
        # two lists of tokens that differ in number are two things
        axis = found.shared[0]
        if any(axis in plan.axes.axes_with(n, *plan.axes.segments) for n in (node, value)):
            return None
    return found


def find_time(
    placeholders: Sequence[fx.Node], states: Sequence[bool], timestep_arg: str | None
) -> int | None:
    """The input that is named like a time, or as the option says."""
    ranks = [
        (rank, i)
        for i, node in enumerate(placeholders)
        if not states[i] and is_tensor(node)
        if (rank := time_rank(short_name(str(node.meta["source"])), timestep_arg)) is not None
    ]
    return min(ranks)[1] if ranks else None


def short_name(source: str) -> str:
    """The last identifier of a Dynamo source: `L['kwargs']['timestep']` is `timestep`."""
    words = re.findall(r"[A-Za-z_]\w*", source)
    return words[-1] if words else source


def is_item(source: str) -> bool:
    """Whether a Dynamo source is an item of a list that is an argument."""
    return re.search(r"\[\d+\]$", source) is not None and short_name(source) != "args"
