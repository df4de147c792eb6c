"""Scheduled: a stream follows the scheduler at hand while that is at the times of its calls."""

from __future__ import annotations

import logging

from specdiff.runtime.sampler.scheduler import ELSEWHERE, Scheduler
from specdiff.runtime.streams.registry import ModelState
from specdiff.runtime.streams.stream import Stream
from specdiff.runtime.tokens.shortfall import Shortfall

logger = logging.getLogger(__name__)

GIVE_SCHEDULER = "specdiff.configure(model, scheduler=pipe.scheduler)"
UNUSED = "the scheduler that was given is not followed: {why}"
WITHOUT = "what forecasts cost is not made good by the scheduler that was given: {why}"


def follow(stream: Stream, scheduler: Scheduler | None, time: float, state: ModelState) -> None:
    """Note what the scheduler says of a stream whose next evaluation is at `time`.

    The first evaluation decides; one that is elsewhere takes the word back.
    """
    if not stream.times:
        found = scheduler.run(time) if scheduler is not None else None
        if isinstance(found, str):
            state.say(logger, UNUSED.format(why=found))
        elif found is not None:
            stream.run = found
            if found.why_not and found.fresh is None:
                state.say(logger, WITHOUT.format(why=found.why_not))
    elif stream.run is not None and not stream.run.is_at(len(stream.times), time):
        stream.run, stream.fit.shortfall = None, Shortfall()
        state.say(logger, UNUSED.format(why=ELSEWHERE))
