"""Input roles: which input is denoised, which output predicts its change, which input is time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from specdiff.errors import Unsupported
from specdiff.passes.rules.registry import is_tensor, shape_of
from specdiff.passes.select.selection import Selection
from specdiff.program import Denoised, time_rank


@dataclass(frozen=True)
class VaryingInputs:
    """The inputs of a graph that may change from step to step."""

    time: fx.Node | None
    scalars: tuple[fx.Node, ...]
    """One number per sample each, such as the strength of guidance; most change from run to run."""
    latents: tuple[fx.Node, ...]

    @property
    def all(self) -> tuple[fx.Node, ...]:
        """Every one of them."""
        return (*((self.time,) if self.time is not None else ()), *self.scalars, *self.latents)


def find_denoised(
    selection: Selection, placeholders: Sequence[fx.Node], is_state: Sequence[bool]
) -> tuple[Denoised, ...]:
    """Pair each output with the input that it denoises: one of matching shape.

    `is_state[i]` says whether input i is a parameter or buffer of the model. Raises Unsupported if
    no output has such an input.
    """
    pairs: list[Denoised] = []
    for output, value in enumerate(selection.axes.results()):
        taken = {pair.latent for pair in pairs}
        matches = [
            (selection.carries(node), -i, node, pair)
            for i, node in enumerate(placeholders)
            if is_tensor(value) and is_tensor(node) and not is_state[i] and i not in taken
            if (pair := _match(selection, (i, node), (output, value))) is not None
        ]
        if matches:
            pairs.append(_latent_among(matches))
    if not pairs:
        raise Unsupported("no input has the shape of an output, so none is known to be denoised")
    return tuple(pairs)


def _latent_among(matches: Sequence[tuple[bool, int, fx.Node, Denoised]]) -> Denoised:
    """Tell the latent from conditions of matching shape.

    A condition carries no tokens, or comes later among the inputs, or is wider and is joined with
    the latent at once.
    """
    *_, node, best = max(matches, key=lambda match: match[:2])
    joined = [m for *_, other, m in matches if set(other.users) & set(node.users)]
    return next((m for m in joined if m.shared is None), best) if best.shared else best


def is_scalar(selection: Selection, node: fx.Node) -> bool:
    """Whether an input is a float with at most one number per sample, or a number nobody reads.

    The latter are storage offsets: Dynamo makes an input of one where a view begins elsewhere, as a
    single time among all times does.
    """
    if not is_tensor(node):
        return isinstance(node.meta.get("val"), float) or not node.users
    value = node.meta["val"]
    samples = selection.axes.samples
    return bool(value.is_floating_point() and value.numel() <= samples)


def _match(
    selection: Selection, latent: tuple[int, fx.Node], velocity: tuple[int, fx.Node]
) -> Denoised | None:
    node, value = latent[1], velocity[1]
    if not node.meta["val"].is_floating_point():
        return None
    pair = Denoised.match(latent[0], shape_of(node), velocity[0], shape_of(value))
    if pair is not None and pair.shared is not None:
        # channels may differ in number, tokens may not
        axis = pair.shared[0]
        if any(
            axis in selection.axes.axes_with(n, *selection.axes.segments) for n in (node, value)
        ):
            return None
    return pair


def find_time(
    placeholders: Sequence[fx.Node], is_state: Sequence[bool], timestep_arg: str | None
) -> int | None:
    """The input with the name that the option gives, or with a usual name of a time."""
    ranks = [
        (rank, i)
        for i, node in enumerate(placeholders)
        if not is_state[i] and is_tensor(node)
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
