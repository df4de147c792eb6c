"""One evaluation of one stream: run the program that the schedule picks, merge, remember."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specdiff.errors import Fault
from specdiff.runtime.sampler.timeline import time_unit
from specdiff.runtime.step.call import Call
from specdiff.runtime.step.clean import cleaned, why_dense
from specdiff.runtime.step.corrector import corrected, filled_up, settle
from specdiff.runtime.step.integrator import integrated
from specdiff.runtime.step.judge import note_miss, span_to_judge, trusted
from specdiff.runtime.step.lookahead import look_ahead
from specdiff.runtime.step.scheduled import GIVE_SCHEDULER
from specdiff.runtime.tokens.forecast import forecast
from specdiff.runtime.tokens.importance import (
    least_important,
    log_scores,
    most_important,
    per_sample,
)
from specdiff.runtime.tokens.schedule import UNSELECTABLE, Place

logger = logging.getLogger(__name__)

BUDGET = "cache budget exceeded"
NEWS = "a condition changed"
FEW = "few steps"
CONTINUED = "the generation goes on in another graph"
STRAYED = "unexplained step"
STRAYED_HINT = (
    "unexplained step: the latent moved where neither earlier latents nor predictions lead, as if"
    " the sampler drew noise or a callback changed the latent; an evaluation after such a step runs"
    f" dense (of a sampler that draws noise, {GIVE_SCHEDULER})"
)
UNEVEN = (
    "times that are not even up to a shift towards noise (Karras, exponential, beta sigmas) do not"
    f" tell where the generation ends, so the plan is placed by a guess: {GIVE_SCHEDULER} places it"
    " exactly"
)

MISSED = "forecasts miss much"
MISSED_HINT = (
    f"{MISSED}: the trajectory bends, as under strong guidance; evaluations are computed beside"
    " those of the quality's plan (a plan that is given, plan=..., is followed as it is)"
)


def tokens_due(call: Call) -> int:
    """Tokens to compute: as many as the plan says, or all where something overrides it."""
    tokens, times = call.schedule.tokens, [*call.stream.times, call.time]
    place = Place.of(times, call.given, call.schedule.usual, call.stream.planned)
    if place.so_far is not None:
        call.state.say(logger, UNEVEN)
    count, reason = call.schedule.decide(place)
    if count == tokens:
        call.stream.planned = (*call.stream.planned, place.index)
    if reason == UNSELECTABLE:
        call.state.counters.fallbacks[UNSELECTABLE] += 1
        call.state.say(logger, f"{UNSELECTABLE}: {call.programs.signature.unselectable}")
    if count < tokens and (override := _overridden(call, count)):
        count, reason = tokens, override
    call.keep(
        batch=call.programs.signature.batch,
        tokens=tokens,
        kind="dense" if count == tokens else "selective" if count else "skipped",
        reason=reason,
        generation=call.stream.number,
        index=len(times) - 1,
        time=call.time,
        told=call.given is not None,
    )
    if call.record is not None and call.record.keeps_latent:
        call.keep(latent=call.latent.clone())
    return count


def _overridden(call: Call, count: int) -> str:
    """Why an evaluation with `count` tokens by its plan is dense all the same; empty if it is not.

    What no plan asks for is counted.
    """
    if call.given is not None and len(call.given) <= call.settings.few:
        return FEW
    if count and call.stream.history.leads_on and not call.stream.selected.lease:
        return "no caches yet"
    reason, message = _fault(call, count)
    if reason:
        call.state.counters.fallbacks[reason] += 1
    if message:
        call.state.say(logger, message)
    return reason


def _fault(call: Call, count: int) -> tuple[str, str]:
    """Why it cannot be forecast, and what is said of that; both empty if it can."""
    history = call.stream.history
    if not history.leads_on:
        return BUDGET if history.made_room else CONTINUED, ""
    if call.stream.conditions.news:
        return NEWS, ""
    if noise := why_dense(call):
        return noise, f"running dense: {noise}"
    if call.strays:
        return STRAYED, STRAYED_HINT
    if not count and not trusted(call):
        return MISSED, MISSED_HINT
    return "", ""


def answer(call: Call, count: int) -> list[Tensor]:
    """Answer the call: the graph's outputs, safe from later evaluations.

    Args:
        call: an evaluation of a stream.
        count: tokens to compute, as decided by `tokens_due`.
    """
    stream, counters = call.stream, call.state.counters
    batch, before = call.programs.signature.batch, stream.history.computed
    settle(call)
    if count == call.schedule.tokens:
        tokens = _dense(call)
        counters.dense += 1
    elif count:
        tokens = _selective(call, count)
        counters.selective += 1
    else:
        tokens = _skip(call)
        counters.skipped += 1
    plain = tokens
    if call.has_weights:
        tokens = filled_up(call, tokens, computed=count > 0)
    elif call.corrects and before:
        tokens = corrected(call, before, tokens, computed=count > 0)
    if call.integrates:
        tokens = integrated(call, plain, tokens, computed=count > 0)
    else:
        stream.fit.course = None
    stream.trail.arrive(call.time, call.reading)
    call.table.touch(stream)
    counters.tokens_computed += batch * count
    counters.tokens_total += batch * call.schedule.tokens
    counters.token_counts = stream.history.counted
    found = cleaned(call, call.programs.tail(call.inputs, tokens), computed=count > 0)
    look_ahead(call, found, tokens)
    # Tail may return a view of the history, or a buffer that its next run overwrites.
    return owned(found)


def owned(outputs: Sequence[Any]) -> list[Any]:
    """Copies of those that are tensors."""
    return [value.clone() if isinstance(value, Tensor) else value for value in outputs]


def _dense(call: Call) -> Tensor:
    stream, selected = call.stream, call.stream.selected
    # A key seen once costs nothing: caches are for trajectories that go on.
    if call.schedule.selects and stream.times:
        _ensure_lease(call)
    if call.schedule.selects:
        caches = selected.lease.caches if selected.lease else call.pool.scratch()
        if selected.lease:
            selected.lease.rows.renew(call.programs.signature, call.inputs)
        evaluation = call.programs.dense(call.inputs, caches)
        tokens = evaluation.tokens
        assert evaluation.importance is not None  # a dense run measures it
        selected.importance = per_sample(evaluation.importance, call.shared)
        call.keep(importance=selected.importance)
    else:
        tokens = call.programs.probe(call.inputs)
        selected.lease = None  # what it holds is older than this step
    tokens = tokens.clone()  # the program's next run may overwrite them
    if call.strays or stream.conditions.news:
        stream.break_off()
    if span_to_judge(call):
        note_miss(call, _forecast(call), tokens)
    stream.history.record_dense(call.clock, tokens)
    return tokens


def _ensure_lease(call: Call) -> None:
    selected = call.stream.selected
    if selected.lease is None:
        call.table.release_idle(call.stream)
        selected.lease = call.pool.lease(call.settings.max_cache_bytes)
    if selected.lease is None:
        call.state.counters.fallbacks[BUDGET] += 1
        call.state.say(logger, f"max_cache_bytes={call.settings.max_cache_bytes}: {BUDGET}")


def _selective(call: Call, count: int) -> Tensor:
    stream, importance = call.stream, call.stream.selected.importance
    assert importance is not None  # measured when the caches were filled
    future = stream.selected.future(call.time, stream.trail.direction)
    scores = log_scores(call.settings, importance, future, stream.history, call.time)
    active = most_important(scores, count, call.shared, call.programs.signature.lengths)
    merged = _with_computed(call, _predicted(call, scores, active), active)
    call.keep(active=active, scores=scores)
    stream.history.record_selective(call.clock, merged, active)
    return merged


def _predicted(call: Call, scores: Tensor, active: Tensor) -> Tensor:
    """Every token forecast; those of the lowest scores as they were (class C2 of the paper)."""
    predicted, share = _forecast(call), call.settings.reuse_share
    if share > 0:
        reused = least_important(scores, share, active)
        previous = call.stream.history.steps[0].tokens
        predicted = torch.where(reused.unsqueeze(-1), previous, predicted)
        call.keep(reused=reused)
    return predicted


def _with_computed(call: Call, predicted: Tensor, active: Tensor) -> Tensor:
    """`predicted` [B, N, C], and the active tokens computed."""
    selected, programs, moment = call.stream.selected, call.programs, (call.counted, call.time)
    assert selected.lease is not None  # no name for it here: tracebacks would keep it
    caches, tables = selected.lease.caches, selected.lease.rows
    row = tables.look_up(programs, call.inputs, caches, moment, call.known)
    evaluation = programs.selective(
        call.inputs,
        caches,
        active,
        text=call.settings.text_steps == "all",
        importance=call.settings.selective_importance,
        row=row,
    )
    if evaluation.tokens.shape[:2] != active.shape:
        raise Fault(f"{list(evaluation.tokens.shape)} for {active.shape[1]} active tokens")
    rows = active.unsqueeze(-1).expand_as(evaluation.tokens)
    merged = predicted.scatter(1, rows, evaluation.tokens.to(predicted.dtype))
    merged = _with_invalid_rows(call, merged)
    if row is not None and call.reading is None:
        merged = tables.checked(merged, programs.signature, call.inputs, moment)
    if evaluation.importance is not None:
        selected.importance = per_sample(evaluation.importance, call.shared)
        call.keep(importance=selected.importance)
    return merged


def _skip(call: Call) -> Tensor:
    predicted = _with_invalid_rows(call, _forecast(call))
    call.stream.history.record_skipped(call.clock, predicted)
    return predicted


def _forecast(call: Call) -> Tensor:
    unit = time_unit([*(call.given or call.stream.times), call.time])
    return forecast(call.settings.forecast, call.stream.history, call.clock, unit)


def _with_invalid_rows(call: Call, tokens: Tensor) -> Tensor:
    """`tokens` [B, N, C], NaN where the model would be: in rows whose latent is not finite."""
    if call.reading is not None:
        return tokens  # the latent was read and is finite
    latent = call.latent
    apart = len(latent) == len(tokens)
    rows = latent.sum(tuple(range(apart, latent.dim())), dtype=torch.float32).reshape(-1, 1, 1)
    return torch.add(tokens, rows, alpha=0).to(tokens.dtype)
