"""Guards: why a call runs dense, each a reason that is counted and said once."""

from __future__ import annotations

import math
from collections.abc import Sequence

from specdiff.program import Signature
from specdiff.runtime.sampler.noise import Process
from specdiff.runtime.sampler.observation import Reading
from specdiff.runtime.step.scheduled import GIVE_SCHEDULER
from specdiff.runtime.step.step import BUDGET
from specdiff.runtime.streams.stream import Stream
from specdiff.runtime.streams.table import MAX_STREAMS
from specdiff.runtime.tokens.schedule import Schedule

NO_TIME = "no time input"
FEW_TOKENS = "too few tokens"
ROWS_DIFFER = "time differs between batch rows"
ROWS_APART = "rows at times of their own in a session that was given one list of times"
ROWS_APART_HINT = (
    f"{ROWS_APART}: give each row a session, and name them with specdiff.rows(model, sessions)"
)
TOKENS_DIFFER = "time differs between tokens of a row"
NOT_FINITE = "latent is not finite"
TIME_NOT_FINITE = "time is not finite"
AMBIGUOUS = "ambiguous stream"
AMBIGUOUS_HINT = (
    "a latent came from nowhere: the sampler draws noise at each step (LCM, ancestral, stochastic,"
    f" SDE: {GIVE_SCHEDULER}); or generations share a prompt tensor (give each a session); or a"
    " batch holds both halves of classifier-free guidance (give guidance_scale); or a callback"
    " changed most of the latent"
)
IDLE_AFTER = 2 * MAX_STREAMS
"""Generations that begin one after another, none of which goes on: more than users take turns."""
IDLE = (
    "no generation is recognised: each call has a latent that follows from no earlier prediction,"
    " and new tensors as conditions; call the model within specdiff.session(model) to say what"
    " belongs together"
)
STILL = "latent does not move with time"
CROWDED = f"more than {MAX_STREAMS} generations at once"
HINTS = {
    AMBIGUOUS: AMBIGUOUS_HINT,
    CROWDED: f"{CROWDED}: give each a session",
    ROWS_APART: ROWS_APART_HINT,
}


def of_graph(
    signature: Signature, schedule: Schedule, max_cache_bytes: int | None, *, timed: bool
) -> str | None:
    """Why no call of a graph can be anything but dense under these settings, if so."""
    if refusal := of_signature(signature, timed=timed):
        return refusal
    if schedule.selects and max_cache_bytes is not None:
        return BUDGET if max_cache_bytes < signature.cache_bytes else None
    return None


def of_signature(signature: Signature, *, timed: bool) -> str | None:
    """Why no call of a graph can be anything but dense under any settings, if so."""
    if signature.time is None and not timed:
        return NO_TIME
    if signature.prunable_tokens < 2 and not signature.unselectable:
        return FEW_TOKENS
    return None


def of_call(
    stream: Stream | None, reading: Reading, candidates: Sequence[Process], *, selects: bool
) -> tuple[str | None, bool]:
    """Why an evaluation may belong to no trajectory, or None; whether it begins a generation.

    Where tokens are selected, all have one time.
    """
    if stream is not None and stream.ambiguous and not stream.trail.returns(reading.time):
        return AMBIGUOUS, False
    if not reading.finite:
        return NOT_FINITE, False
    if not math.isfinite(reading.time):
        return TIME_NOT_FINITE, False
    times = reading.times
    if times.scattered or (selects and not times.uniform):
        return ROWS_DIFFER if times.differ else TOKENS_DIFFER, False
    if stream is None:
        return None, True
    relation = stream.relation(reading, candidates)
    if relation == "foreign":
        return AMBIGUOUS, False
    begins = relation == "restarts"
    before = stream.trail.row_times
    if not begins and before is not None and not times.follow(before):
        return ROWS_DIFFER if times.differ else TOKENS_DIFFER, False
    if reading.change == 0 and reading.time != stream.times[-1] and not begins:
        return STILL, False  # a part of a broken model, whose conditions were taken for a latent
    return None, begins
