"""Integrator: `target="solution"`: what the sampler gets for its step to end on the solution.

Until the sampler is known to take steps of first order, at times that are known, and wherever it is
found not to, steps are as with `target="dense"`; why is said once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from specdiff.runtime.sampler.course import Course
from specdiff.runtime.sampler.displacement import POOR_FIT, Displacement, guided
from specdiff.runtime.sampler.known_step import FIRST_ORDER
from specdiff.runtime.sampler.learned import Times, exact_times
from specdiff.runtime.sampler.remains import Awaited, precision_of
from specdiff.runtime.sampler.timeline import NEAR, evaluations_left, next_time
from specdiff.runtime.step.call import Call
from specdiff.runtime.step.corrector import doubted, is_of_first_order, note_proof
from specdiff.runtime.streams.trail import CHECK_LAG

logger = logging.getLogger(__name__)

COARSEST = 1e-4
"""Relative rounding of the time input from which on the next time cannot be told."""
AS_DENSE = 'target="solution" has no effect, steps are as with "dense": '
SELECTS = "the plan computes some tokens of a step (leave out cache_ratio)"
NOT_ADDITIVE = "what follows the model's last tokens is not linear in them"
ROUNDED = (
    "the time input is rounded ({dtype}), so the next time is not known: it is learned in this run,"
    " for later ones of the same steps, unless you give the times,"
    " specdiff.session(model, timesteps=...)"
)
ROWS_DIFFER = "rows of the batch are at times of their own"
OTHER_ORDER = (
    "the sampler's steps do not each follow from one prediction, as those of multistep solvers,"
    " which aim at the solution already"
)
NO_CLOCK = (
    "the sampler's steps are those of neither Euler on a flow nor DDIM on predicted noise, without"
    " noise of their own"
)


def integrated(call: Call, plain: Tensor, as_dense: Tensor, *, computed: bool) -> Tensor:
    """What to hand the sampler, [B, N, C].

    Args:
        call: of a model whose target is the solution.
        plain: what was computed or forecast, [B, N, C].
        as_dense: what the sampler would get if the target were "dense".
        computed: whether `plain` was computed, in full.
    """
    stream = call.stream
    course = stream.fit.course = stream.fit.course or Course()
    _learn_times(call, course)
    course.refusal = course.refusal or _refusal(call, course)
    if not course.refusal and course.process is None:
        _learn_process(call, course)
    if course.refusal:
        call.state.say(logger, AS_DENSE + course.refusal)
        return as_dense
    value, handed = plain if computed else None, as_dense
    time = course.learned[len(stream.times)] if course.learned else call.clock
    assert not isinstance(time, Tensor)  # rows at times of their own are refused
    if course.process is not None:
        stream.fit.correction = None  # what forecasts cost is part of what the latent lacks
        due = next_time([*stream.times, call.time], call.given or course.learned)
        # a last step to where it is, as with discrete times that end at 0, leads nowhere
        found = plain if due == time else course.answer(time, due, value).to(plain.dtype)
        handed = torch.where(plain.isnan(), plain, found)
    course.hand(time, value, handed)
    return handed


def _learn_times(call: Call, course: Course) -> None:
    """Where times are rounded: what an earlier run has shown, or else note what this one does."""
    if call.given is not None or not (dtype := _coarse_dtype(call)):
        return
    times = [*call.stream.times, call.time]
    course.learned = call.learned.find(times)
    if call.seen is not None:
        course.moves.append(call.seen)
    if course.learned is None and evaluations_left(times, None) < 1 + NEAR:
        exact = _exact_times(call, course.moves, times, torch.finfo(dtype).eps)
        if exact:
            call.learned.keep(times, exact)


def _exact_times(
    call: Call, moves: Sequence[Displacement], times: Sequence[float], precision: float
) -> Times | None:
    """Of the run that ends here, if it is a flow's."""
    sampler = call.stream.fit.sampler
    if sampler is None or not sampler.chosen or len(moves) != len(times) - 1:
        return None
    process, way = sampler.chosen
    rate = sampler.rates[way].item()
    steps = [move.factor(way) / rate for move in moves]
    return exact_times(times, steps, precision) if process.free else None


def _refusal(call: Call, course: Course) -> str:
    """Why steps are as with "dense"; empty if they are not."""
    signature, stream = call.programs.signature, call.stream
    if call.schedule.selects:
        return SELECTS
    if not signature.additive:
        return NOT_ADDITIVE
    if call.reading is not None and call.reading.times.differ:
        return ROWS_DIFFER
    if call.given is None and not course.learned and (rounded := _coarse_dtype(call)):
        return ROUNDED.format(dtype=str(rounded)[6:])
    if stream.times and not _follows(call, course):
        stream.fit.first_order, stream.fit.correction = False, None
    return "" if stream.fit.first_order else OTHER_ORDER


def _coarse_dtype(call: Call) -> torch.dtype | None:
    """Of the time input, if it rounds too much."""
    index = call.programs.signature.time
    time = None if index is None else call.inputs[index]
    if not isinstance(time, Tensor) or not time.is_floating_point():
        return None
    return time.dtype if torch.finfo(time.dtype).eps > COARSEST else None


def _follows(call: Call, course: Course) -> bool:
    """Whether the sampler's latest step, of those looked at, followed from its own prediction."""
    stream = call.stream
    if call.time == stream.times[-1] and not course.learned and stream.run is None:
        return False  # Heun, or another that evaluates twice
    if call.reading is not None:
        follows = call.seen is None or is_of_first_order(call, call.seen)
        if follows:
            note_proof(call)
        return follows
    if not stream.latents:
        return True
    course.orders.append(Awaited(_left_of_first_order(call)))
    return len(course.orders) <= CHECK_LAG or course.orders.popleft().read() <= FIRST_ORDER


def _left_of_first_order(call: Call) -> Tensor:
    """What no candidate explains of the latest step, less rounding; a scalar on the device."""
    parts = call.programs.signature.moving_parts(call.inputs)
    seen = Displacement.of(parts, call.stream.latents, call.stream.predictions)
    left = seen.fits(call.candidates, call.stream.times[-1], call.time).residuals.min()
    return left - seen.rounding(precision_of(parts))


def _learn_process(call: Call, course: Course) -> None:
    """Note how the sampler moves the latent, or that it is none that can be integrated."""
    sampler = call.stream.fit.sampler
    if sampler is None or sampler.chosen is None or doubted(call):
        return
    process, way = sampler.chosen
    if not sampler.leaves_less(POOR_FIT) or process.clock(call.time) is None:
        course.refusal = NO_CLOCK
    else:
        course.process = process
        course.solution.guidance = partial(_guided, scale=call.settings.guidance_scale, way=way)


def _guided(values: Tensor, scale: float | None, way: int) -> Tensor:
    return guided(values, scale)[way]
