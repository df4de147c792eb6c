"""The callables that answer a compiled graph: `Runtime`, and `DenseOnly` for refused graphs."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specdiff.errors import Fault
from specdiff.options import Options
from specdiff.program import Programs
from specdiff.runtime.caches import CachePool
from specdiff.runtime.call import Call
from specdiff.runtime.history import History
from specdiff.runtime.joint import Joint
from specdiff.runtime.noise import Process, processes
from specdiff.runtime.prediction import Displacement
from specdiff.runtime.reading import Reading, read
from specdiff.runtime.recording import StepRecord, recorded
from specdiff.runtime.registry import (
    ModelState,
    Session,
    active_session,
    effective,
    state_of_call,
)
from specdiff.runtime.schedule import Schedule
from specdiff.runtime.step import BUDGET, answer
from specdiff.runtime.streams import Stream, StreamTable
from specdiff.runtime.times import KnownTimes
from specdiff.settings import Settings

logger = logging.getLogger(__name__)

NO_TIME = "no time input"
FEW_TOKENS = "too few tokens"
ROWS_DIFFER = "time differs between batch rows"
NOT_FINITE = "latent is not finite"
TIME_NOT_FINITE = "time is not finite"
AMBIGUOUS = "ambiguous stream"
AMBIGUOUS_HINT = (
    "a latent came from nowhere: give two generations that share a prompt tensor a session each;"
    " if batches hold both halves of classifier-free guidance, give guidance_scale"
)
STILL = "latent does not move with time"


class Runtime:
    """Answers one compiled graph: decides per evaluation which of its programs runs.

    Args:
        programs: what the compiler made of the graph.
        options: those the graph was compiled with; sessions and `configure` override them.
    """

    def __init__(self, programs: Programs, options: Options) -> None:
        self.programs = programs
        self.options = options
        self.pool = CachePool(programs.signature.caches)
        self._parameters = programs.signature.indices("parameter")
        self._conditions = programs.signature.indices("condition")
        self._nameless = ModelState()
        self.known_times = KnownTimes()
        self._generations = itertools.count()
        self._fault = ""

    @torch.no_grad()
    def __call__(self, *inputs: object) -> list[Tensor]:
        """The graph's outputs for its flat inputs, by a dense, selective or skipped evaluation."""
        state = state_of_call(self, inputs, self._parameters, self._nameless)
        device = self.programs.signature.tokens.device
        return recorded(state.recordings, device, partial(self._answer, inputs, state))

    def _answer(
        self, inputs: Sequence[object], state: ModelState, record: StepRecord | None
    ) -> list[Tensor]:
        session = active_session(state)
        settings = self._settings(state, session)
        schedule = Schedule.of(settings, self.programs.signature.lengths)
        given = session.times if session is not None else None
        refusal = self._refusal(settings, schedule, given)
        if refusal is not None:
            return self._fall_back(inputs, state, refusal, record)
        owner: ModelState | Session = state if session is None else session
        table = owner.table(self)
        conditions = [inputs[index] for index in self._conditions]
        stream = table.find(conditions)
        reading = self._read(inputs, table, stream) if given is None else None
        candidates = processes(settings.prediction, settings.alphas_cumprod)
        refusal, begins = _place(stream, reading, given, candidates)
        if refusal is not None:
            _abandon(table, stream, refusal)
            return self._fall_back(inputs, state, refusal, record, schedule.selects)
        if stream is None or begins:
            stream = table.start(conditions, self._history(), replacing=stream)
            stream.number = next(self._generations)
        time = reading.time if reading is not None else (given or ())[len(stream.times)]
        call = Call(
            self.programs, self.pool, table, stream, state, settings, schedule, inputs, time,
            reading, given, candidates, self.known_times, record,
        )  # fmt: skip
        try:
            return answer(call)
        except Fault as error:
            self._fault = f"internal error: {error}"
            table.drop(stream)
            logger.warning("specdiff failed on a graph, which runs dense", exc_info=True)
            return self._fall_back(inputs, state, self._fault, record)
        except BaseException:
            # Half an evaluation leaves caches and history that belong to no point in time.
            table.drop(stream)
            raise

    def _settings(self, state: ModelState, session: Session | None) -> Settings:
        settings = effective(self.options, state, session)
        batch = self.programs.signature.batch
        if settings.guidance_scale is not None and batch % 2:
            state.say(logger, f"guidance_scale ignored: a batch of {batch} has no two halves")
            settings = dataclasses.replace(settings, guidance_scale=None)
        return settings

    def _refusal(
        self, settings: Settings, schedule: Schedule, given: tuple[float, ...] | None
    ) -> str | None:
        """Why no call of this graph can be anything but dense, if so."""
        signature, budget = self.programs.signature, settings.max_cache_bytes
        if self._fault:
            return self._fault
        if signature.time is None and given is None:
            return NO_TIME
        if signature.prunable_tokens < 2:
            return FEW_TOKENS
        if schedule.selects and budget is not None and budget < signature.cache_bytes:
            return BUDGET
        return None

    def _read(self, inputs: Sequence[object], table: StreamTable, stream: Stream | None) -> Reading:
        signature = self.programs.signature
        latent, time = inputs[signature.latent], signature.time
        assert isinstance(latent, Tensor) and time is not None
        moved = joint = None
        if stream is not None and stream.latents:
            parts = signature.moving_parts(inputs)
            moved = Displacement.of(parts, stream.latents, stream.predictions)
            joint = Joint.of(stream, table.partner(stream), parts)
        return read(inputs[time], latent, moved, joint)

    def _history(self) -> History:
        tokens = self.programs.signature.tokens
        return History(tokens.shape[0], tokens.shape[1], tokens.device)

    def _fall_back(
        self,
        inputs: Sequence[object],
        state: ModelState,
        reason: str,
        record: StepRecord | None,
        selects: bool = False,
    ) -> list[Tensor]:
        """A dense evaluation that touches no stream, counted with its reason.

        Where others of this plan select tokens, it runs the same dense program as they do.
        """
        if record is not None:
            record.reason = reason
            record.batch = self.programs.signature.batch
            record.tokens = self.programs.signature.prunable_tokens
        state.counters.dense += 1
        state.counters.fallbacks[reason] += 1
        tokens = self.programs.signature.batch * self.programs.signature.prunable_tokens
        state.counters.tokens_computed += tokens
        state.counters.tokens_total += tokens
        state.say(logger, f"running dense: {reason}")
        if reason == AMBIGUOUS:
            state.say(logger, AMBIGUOUS_HINT)
        programs = self.programs
        if selects:
            found = programs.dense(inputs, self.pool.scratch()).tokens
        else:
            found = programs.probe(inputs)
        return [output.clone() for output in programs.tail(inputs, found)]


class DenseOnly:
    """Answers a graph that the compiler refused to rewrite: dense, with the reason in the stats.

    Args:
        function: takes the graph's flat inputs and returns its outputs.
        reason: why the graph was refused.
        parameters: positions of the model's parameters among the inputs.
    """

    def __init__(
        self, function: Callable[..., Any], reason: str, parameters: Sequence[int]
    ) -> None:
        self._function = function
        self._reason = reason
        self._parameters = tuple(parameters)
        self._nameless = ModelState()

    def __call__(self, *inputs: object) -> Any:
        """The function's outputs, gradients included."""
        state = state_of_call(self, inputs, self._parameters, self._nameless)
        state.counters.dense += 1
        state.counters.fallbacks[self._reason] += 1
        state.say(logger, f"running dense: {self._reason}")

        def answer(record: StepRecord | None) -> Any:
            if record is not None:
                record.reason = self._reason
            return self._function(*inputs)

        device = next((i.device for i in inputs if isinstance(i, Tensor)), torch.device("cpu"))
        return recorded(state.recordings, device, answer)


def _place(
    stream: Stream | None,
    reading: Reading | None,
    given: tuple[float, ...] | None,
    candidates: Sequence[Process],
) -> tuple[str | None, bool]:
    """Why an evaluation may belong to no trajectory, or None; whether it begins a generation."""
    if reading is None:
        return None, stream is None or (given is not None and len(stream.times) >= len(given))
    if stream is not None and stream.ambiguous:
        return AMBIGUOUS, False
    if not reading.finite:
        return NOT_FINITE, False
    if not math.isfinite(reading.time):
        return TIME_NOT_FINITE, False
    if not reading.same_time:
        return ROWS_DIFFER, False
    if stream is None:
        return None, True
    relation = stream.relation(reading, candidates)
    if relation == "foreign":
        return AMBIGUOUS, False
    if reading.change == 0 and reading.time != stream.times[-1]:
        return STILL, False  # a part of a broken model, whose conditions were taken for a latent
    return None, relation == "restarts"


def _abandon(table: StreamTable, stream: Stream | None, reason: str) -> None:
    """Leave no state of a suspicious trajectory but the mark that its key is ambiguous."""
    if stream is not None and reason == AMBIGUOUS:
        stream.become_ambiguous()
    elif stream is not None:
        table.drop(stream)
