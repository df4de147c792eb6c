"""Dispatch: what answers a compiled graph, by deciding which of its programs runs."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from specdiff.errors import Fault
from specdiff.options import Options
from specdiff.program import Programs
from specdiff.runtime.records.recording import StepRecord, recorded
from specdiff.runtime.sampler.guidance_pair import Joint
from specdiff.runtime.sampler.noise import Process, processes
from specdiff.runtime.sampler.observation import Reading, read
from specdiff.runtime.sampler.remains import EXPLAINED, remains
from specdiff.runtime.sampler.row_times import UnreadTimes, paced
from specdiff.runtime.sampler.sampler_fit import Displacement
from specdiff.runtime.step import fallbacks
from specdiff.runtime.step.call import Call
from specdiff.runtime.step.step import answer, owned
from specdiff.runtime.streams.caches import CachePool
from specdiff.runtime.streams.progress import Progress
from specdiff.runtime.streams.recognition import followed
from specdiff.runtime.streams.registry import (
    ModelState,
    Session,
    active_session,
    effective,
    state_of_call,
)
from specdiff.runtime.streams.streams import CHECK_LAG, Stream, StreamTable, turns_back
from specdiff.runtime.streams.time_tables import KnownTimes
from specdiff.runtime.tokens.history import History
from specdiff.runtime.tokens.schedule import Schedule
from specdiff.settings import Settings, why_off

logger = logging.getLogger(__name__)


class Runtime:
    """Answers one compiled graph: decides per evaluation which of its programs runs.

    Args:
        programs: what the compiler made of the graph.
        options: those the graph was compiled with; sessions and `configure` override them.
        plain: the graph as it came, for when a program of ours fails; None: `programs.probe`.
        state: of the model; None: found by the parameters among the inputs.
    """

    def __init__(
        self,
        programs: Programs,
        options: Options,
        plain: Callable[..., Sequence[Tensor]] | None = None,
        state: ModelState | None = None,
    ) -> None:
        self.programs = programs
        self.options = options
        self.pool = CachePool(programs.signature.caches)
        self._parameters = programs.signature.indices("parameter")
        self._conditions = programs.signature.indices("condition")
        self._nameless = ModelState()
        self._state = state
        if state is not None:
            state.graphs[self] = id(self)
        self.known_times = KnownTimes()
        self._generations = itertools.count()
        self._fault = ""
        self._plain = plain
        self._turn = threading.RLock()
        """Held by the thread whose evaluation it is: streams, caches and programs are shared."""

    @property
    def unplanned(self) -> str:
        """Why no whole steps can be forecast; empty if they can."""
        signature = self.programs.signature
        return self._fault or fallbacks.of_signature(signature, timed=False) or ""

    @property
    def unselectable(self) -> str:
        """Why no tokens can be selected; empty if they can."""
        return self.unplanned or self.programs.signature.unselectable

    @torch.no_grad()
    def __call__(self, *inputs: object) -> list[Tensor]:
        """The graph's outputs for its flat inputs, by a dense, selective or skipped evaluation."""
        device = self.programs.signature.tokens.device
        with self._turn:
            state = self._state or state_of_call(self, inputs, self._parameters, self._nameless)
            return recorded(state.recordings, device, partial(self._answer, inputs, state))

    def _answer(
        self, inputs: Sequence[object], state: ModelState, record: StepRecord | None
    ) -> list[Tensor]:
        session = active_session(state)
        progress = session.progress if session is not None else None
        settings = self._settings(state, session)
        if off := why_off(settings):
            return self._untouched(inputs, state, session, off, record)
        signature, budget = self.programs.signature, settings.max_cache_bytes
        schedule = Schedule.of(settings, signature.lengths, selectable=not signature.unselectable)
        refusal = self._fault or fallbacks.of_graph(
            signature, schedule, budget, timed=progress is not None
        )
        if refusal:
            return self._fall_back(inputs, state, refusal, record)
        owner: ModelState | Session = state if session is None else session
        table = owner.table(self)
        conditions = [inputs[index] for index in self._conditions]
        left = cache(partial(self._remains, inputs, owner))
        known, reading = table.find(conditions), None
        if known is None:
            known = self._followed(inputs, table, conditions, progress, left)
        if known is not None and known.trail and schedule.forecasts:
            known.check(left(known), 0 if progress is None else CHECK_LAG)
        candidates = processes(settings.prediction, settings.alphas_cumprod)
        if progress is None:
            reading = self._read(inputs, table, known)
            stream = self._continued(
                reading, table, known, conditions, candidates, selects=schedule.selects
            )
            if table.begun == fallbacks.IDLE_AFTER and schedule.forecasts:
                state.say(logger, fallbacks.IDLE)
            if isinstance(stream, str):
                return self._fall_back(inputs, state, stream, record, schedule.selects)
        else:
            stream = self._timed(inputs, table, known, conditions, progress)
        time = reading.time if reading is not None else (stream.given or ())[len(stream.times)]
        call = Call(
            self.programs, self.pool, table, stream, state, settings, schedule, inputs, time,
            reading, stream.given, candidates, self.known_times, record,
        )  # fmt: skip
        outputs = self._run(call)
        if progress is not None:
            progress.advance(stream, self._time_input(inputs))
        return outputs

    def _run(self, call: Call) -> list[Tensor]:
        try:
            return answer(call)
        except Fault as error:
            self._fault = f"internal error: {error}"
            call.table.drop(call.stream)
            logger.warning("specdiff failed on a graph, which runs dense", exc_info=True)
            return self._fall_back(call.inputs, call.state, self._fault, call.record)
        except BaseException:
            # Half an evaluation leaves caches and history that belong to no point in time.
            call.table.drop(call.stream)
            raise

    def _continued(
        self,
        reading: Reading,
        table: StreamTable,
        stream: Stream | None,
        conditions: Sequence[object],
        candidates: Sequence[Process],
        *,
        selects: bool,
    ) -> Stream | str:
        """The stream of a call, begun if need be, or why it may belong to no trajectory."""
        if stream is None and table.is_crowded_out(conditions, reading.time):
            return fallbacks.CROWDED
        refusal, begins = fallbacks.of_call(stream, reading, candidates, selects=selects)
        if refusal is not None:
            _abandon(table, stream, refusal, reading.time)
            return refusal
        if stream is not None and not begins:
            table.begun = 0
            stream.doubtful &= reading.time == stream.times[-1]
            return stream
        new = self._begin(table, stream, conditions)
        table.begun += 1
        new.doubtful = stream is not None and (stream.ambiguous or not stream.direction)
        return new

    def _timed(
        self,
        inputs: Sequence[object],
        table: StreamTable,
        stream: Stream | None,
        conditions: Sequence[object],
        progress: Progress,
    ) -> Stream:
        """The stream of a call in a session with times, begun if need be."""
        index = progress.start(stream, self._time_input(inputs))
        if index is not None:
            stream = self._begin(table, stream, conditions)
            progress.begin(stream, index)
        assert stream is not None  # where there is none, one begins
        return stream

    def _begin(
        self, table: StreamTable, before: Stream | None, conditions: Sequence[object]
    ) -> Stream:
        stream = table.start(conditions, self._history(), replacing=before)
        stream.number = next(self._generations)
        return stream

    def _time_input(self, inputs: Sequence[object]) -> object:
        time = self.programs.signature.time
        return None if time is None else inputs[time]

    def _settings(self, state: ModelState, session: Session | None) -> Settings:
        settings = effective(self.options, state, session)
        batch = self.programs.signature.batch
        if settings.guidance_scale is not None and batch % 2:
            state.say(logger, f"guidance_scale ignored: a batch of {batch} has no two halves")
            settings = dataclasses.replace(settings, guidance_scale=None)
        return settings

    def _read(self, inputs: Sequence[object], table: StreamTable, stream: Stream | None) -> Reading:
        signature = self.programs.signature
        latent, time = inputs[signature.latent], signature.time
        assert isinstance(latent, Tensor) and time is not None
        times = UnreadTimes.of(inputs[time], signature.batch, latent.device)
        moved = joint = pace = None
        if stream is not None and stream.latents:
            parts, pace = signature.moving_parts(inputs), times.pace(stream.row_times)
            ways = tuple(tuple(paced(p, pace) for p in way) for way in stream.predictions)
            moved = Displacement.of(parts, stream.latents, ways)
            joint = Joint.of(stream, table.partner(stream), parts, pace)
        return read(times, latent, moved, joint, pace)

    def _followed(
        self,
        inputs: Sequence[object],
        table: StreamTable,
        conditions: Sequence[object],
        progress: Progress | None,
        left: Callable[[Stream], Tensor],
    ) -> Stream | None:
        """The stream that goes on with conditions which are none of a stream's.

        `left` measures what a stream leaves unexplained of the step to this call.
        """
        signature = self.programs.signature
        parts = signature.moving_parts(inputs)

        def explains(stream: Stream) -> bool:
            steps = zip(parts, stream.latents, strict=True)
            if all(torch.equal(now, before) for now, before in steps):
                return False  # the other half of guidance, perhaps
            return left(stream).item() < EXPLAINED

        if progress is not None:
            return followed(table, conditions, progress.may_go_on, explains)
        latent = inputs[signature.latent]
        assert isinstance(latent, Tensor)
        time = UnreadTimes.of(self._time_input(inputs), signature.batch, latent.device).read().time

        def goes_on(stream: Stream) -> bool:
            return not turns_back(stream.times, time)

        return followed(table, conditions, goes_on, explains)

    def _remains(
        self, inputs: Sequence[object], owner: ModelState | Session, stream: Stream
    ) -> Tensor:
        """What of the step to the present evaluation nothing explains that the stream saw."""
        signature = self.programs.signature
        parts, others = signature.moving_parts(inputs), owner.seen_beside(stream)
        return remains(parts, stream.trail, others, signature.batch)

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
        self._count_dense(state, reason, record)
        state.counters.fallbacks[reason] += 1
        state.say(logger, f"running dense: {reason}")
        if reason in fallbacks.HINTS:
            state.say(logger, fallbacks.HINTS[reason])
        programs = self.programs
        if self._fault and self._plain is not None:
            return owned(self._plain(*inputs))
        if selects:
            found = programs.dense(inputs, self.pool.scratch()).tokens
        else:
            found = programs.probe(inputs)
        return owned(programs.tail(inputs, found))

    def _untouched(
        self,
        inputs: Sequence[object],
        state: ModelState,
        session: Session | None,
        off: str,
        record: StepRecord | None,
    ) -> list[Tensor]:
        """The graph as it came, acceleration being off.

        A trajectory that this evaluation belongs to begins anew once acceleration is back.
        """
        state.say(logger, f"acceleration is off: {off}", logging.INFO)
        self._count_dense(state, off, record)
        if record is not None:
            record.kind = "dense"
        owner: ModelState | Session = state if session is None else session
        table, conditions = owner.table(self), [inputs[index] for index in self._conditions]
        stream = table.find(conditions)
        if session is not None and session.progress is not None:
            begin = partial(self._begin, table, stream, conditions)
            session.progress.pass_over(stream, begin, self._time_input(inputs))
        elif stream is not None:
            table.drop(stream)
        if self._plain is not None:
            return owned(self._plain(*inputs))
        return owned(self.programs.tail(inputs, self.programs.probe(inputs)))

    def _count_dense(self, state: ModelState, reason: str, record: StepRecord | None) -> None:
        """An evaluation of no stream has computed every token."""
        signature = self.programs.signature
        if record is not None:
            record.reason = reason
            record.batch, record.tokens = signature.batch, signature.prunable_tokens
        tokens = signature.batch * signature.prunable_tokens
        state.counters.dense += 1
        state.counters.tokens_computed += tokens
        state.counters.tokens_total += tokens


def _abandon(table: StreamTable, stream: Stream | None, reason: str, time: float) -> None:
    """Leave no state of a suspicious trajectory but that its key is ambiguous, and since when."""
    if stream is not None and reason == fallbacks.AMBIGUOUS:
        stream.become_ambiguous()
        stream.times.append(time)
    elif stream is not None:
        table.drop(stream)
