"""Is the step plan right on a model? Driven as Euler drives it, against the model itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import specdiff
from specdiff.plan import Plan
from specdiff.runtime.blocks.root_programs import flattened
from tests.models import Case, Inputs

STEPS, SPAN = 10, 0.05
"""Steps, and what share of time they take."""
OWN_TIMES = 0.8
"""Time of the second row, relative to the first's, where rows are at times of their own."""
NEAR = 0.1
"""Relative error of a forecast at most, and on top twice what the output changed since it was last
computed: one of random weights is not smooth."""


SAME = 1e-5
"""Relative error of a computed step at most."""


class Wrong(AssertionError):
    """The step plan gives what it must not give."""


def step_plan(case: Case) -> str:
    """Why a model has no step plan; empty if it has one. Raises Wrong where its outputs are wrong.

    Rows share their times at first, and then are at times of their own.
    """
    for apart in (False, True):
        times = list(falling(case, apart=apart))
        run(case, times, Plan.every(1))
        stats = run(case, times, Plan.every(2), correction=False)
        if not stats.skipped:
            return "; ".join(stats.fallbacks) or "no step was skipped"
        if stats.fallbacks:
            return "; ".join(f"{count} dense: {why}" for why, count in stats.fallbacks.items())
    return ""


@torch.no_grad()
def run(case: Case, times: Sequence[Any], plan: Plan, **ablation: bool) -> specdiff.Stats:
    """One generation of the attached model."""
    model = case.model
    call, skipped, newest = case.inputs, 0, predictions(model(**case.inputs))
    specdiff.attach(model, plan=plan, cache_ratio=1.0, ablation=ablation)
    specdiff.reset(model)
    for now, then in zip(times, [*times[1:], times[-1]], strict=True):
        call = {**call, case.time: now}
        found, exact = model(**call), model.forward(**call)
        before, skipped = skipped, specdiff.stats(model).skipped
        found, exact = predictions(found), predictions(exact)
        if skipped == before:
            newest = exact
        check(found, exact, newest, computed=skipped == before, exactly=plan == Plan.every(1))
        call = moved(case, call, found, then)
    stats = specdiff.stats(model)
    specdiff.detach(model)
    return stats


def check(
    found: Sequence[Tensor],
    exact: Sequence[Tensor],
    newest: Sequence[Tensor],
    *,
    computed: bool,
    exactly: bool,
) -> None:
    """Outputs, against the model's on the same inputs and on those of the latest computed step."""
    for ours, theirs, before in zip(found, exact, newest, strict=True):
        if not ours.isfinite().all():
            raise Wrong("an output is not finite")
        if exactly and not torch.equal(ours, theirs):
            raise Wrong("a dense step differs from the model's")
        error, allowed = _distance(ours, theirs), NEAR + 2 * _distance(before, theirs)
        if error > (SAME if computed else allowed):
            raise Wrong(f"error {error:.1e} of a {'computed' if computed else 'skipped'} step")


def _distance(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm().clamp_min(1e-12)).item()


def falling(case: Case, *, apart: bool) -> Iterator[Any]:
    """The time input at every step; given frames stay where they are."""
    time = case.inputs[case.time]
    rows = time if isinstance(time, Tensor) else torch.tensor(time)
    if apart and rows.dim() and len(rows) == 2:
        rows = torch.stack([rows[0], (rows[1] * OWN_TIMES).to(rows.dtype)])
    moves = rows == _top(rows)
    for step in range(STEPS):
        now = torch.where(moves, (rows * (1 - SPAN * step / STEPS)).to(rows.dtype), rows)
        yield now if isinstance(time, Tensor) else now.item()


def moved(case: Case, call: Inputs, output: Sequence[Tensor], then: Any) -> Inputs:
    """The call with every latent moved along its prediction, to another time."""
    now = call[case.time]
    unit = 1000 if float(torch.as_tensor(now).max()) > 1.5 else 1
    step = (torch.as_tensor(then) - torch.as_tensor(now)).float() / unit
    velocities = iter(output)
    changed = {}
    for name in (case.latent, *case.also):
        latents, structure = pytree.tree_flatten(call[name])
        steps = step if step.dim() and len(latents) == len(step) > 1 else [step] * len(latents)
        pairs = zip(latents, steps, strict=True)
        after = [_euler(latent, next(velocities), by) for latent, by in pairs]
        changed[name] = pytree.tree_unflatten(after, structure)
    return {**call, **changed}


def _euler(latent: Tensor, velocity: Tensor, step: Tensor) -> Tensor:
    """One latent moved, as much of it as its prediction is for."""
    here = [slice(None)] * latent.dim()
    there = list(here)
    for axis, (n, m) in enumerate(zip(latent.shape, velocity.shape, strict=True)):
        size = min(n, m)
        here[axis] = slice(size)
        # a longer sequence has the text in front, more channels are a variance
        packed = latent.dim() == 3 and axis == 1 and m > n
        there[axis] = slice(m - size, None) if packed else slice(size)
    after = latent.clone()
    after[tuple(here)] += _over(step, latent) * velocity[tuple(there)]
    return after


def _over(step: Tensor, latent: Tensor) -> Tensor:
    """A step in time, to multiply a latent by."""
    if step.dim() and step.shape[0] not in (1, len(latent)):
        step = step.reshape(-1)[0]
    if step.dim() == 2 and step.shape[1] not in latent.shape[1:2]:
        step = step.amin(1)
    return step.reshape(*step.shape, *[1] * (latent.dim() - step.dim()))


def _top(times: Tensor) -> Tensor:
    """The largest in each row."""
    return (
        times.flatten(1).amax(1).reshape(-1, *[1] * (times.dim() - 1)) if times.dim() > 1 else times
    )


def predictions(output: Any) -> list[Tensor]:
    """All floats that a model returns."""
    leaves, _ = flattened(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
