"""Dispatch: what answers a compiled graph, by deciding which of its programs runs."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from specdiff.errors import Fault
from specdiff.options import Options
from specdiff.program import Programs
from specdiff.runtime.records.recording import StepRecord, recorded
from specdiff.runtime.sampler.learned import LearnedTimes
from specdiff.runtime.sampler.noise import processes
from specdiff.runtime.step import fallbacks
from specdiff.runtime.step.agreement import computed_by_one
from specdiff.runtime.step.call import Call
from specdiff.runtime.step.ownership import Inquiry
from specdiff.runtime.step.scheduled import follow
from specdiff.runtime.step.step import answer, owned, tokens_due
from specdiff.runtime.streams.caches import CachePool
from specdiff.runtime.streams.progress import Progress
from specdiff.runtime.streams.registry import (
    ModelState,
    Session,
    StreamOwner,
    active_session,
    effective,
    named_rows,
    scheduler_of,
    state_of_call,
)
from specdiff.runtime.streams.stream import Stream
from specdiff.runtime.streams.table import StreamTable
from specdiff.runtime.streams.time_tables import KnownTimes
from specdiff.runtime.tokens.history import History
from specdiff.runtime.tokens.schedule import Schedule
from specdiff.settings import Settings, why_off

logger = logging.getLogger(__name__)

AGREED = "another rank computes"
ROWS_UNATTACHED = (
    "specdiff.rows names the rows of an attached model: specdiff.attach(model), compiled or not"
)


@dataclass(frozen=True)
class Due:
    """One evaluation, decided but not made."""

    computes: bool
    """Whether the model is run for it."""
    make: Callable[[], list[Tensor]]
    """Makes it, once: the graph's outputs."""
    instead: Callable[[], list[Tensor]] | None = None
    """The same by running the model, where the plan would not."""


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
        self._learned_times = LearnedTimes()
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
            session = active_session(state)
            return recorded(
                state.recordings,
                device,
                lambda record: self.due(inputs, state, session, record).make(),
            )

    def due(
        self,
        inputs: Sequence[object],
        state: ModelState,
        session: Session | None,
        record: StepRecord | None,
    ) -> Due:
        """Decide an evaluation, to be made before the next of its stream is decided."""
        due = self._decided(inputs, state, session, record)
        if state.group is None:
            return due
        device = self.programs.signature.tokens.device
        if computed_by_one(state.group, due.computes, device) and due.instead is not None:
            return Due(True, due.instead)
        return due

    def _decided(
        self,
        inputs: Sequence[object],
        state: ModelState,
        session: Session | None,
        record: StepRecord | None,
    ) -> Due:
        """By this process alone.

        Off: the graph as it came. Refused, or of no trajectory: dense. Else by its stream.
        """
        settings = self._settings(state, session)
        if off := why_off(settings):
            return Due(True, partial(self._untouched, inputs, state, session, off, record))
        progress = session.progress if session is not None else None
        schedule = self._schedule(settings)
        refusal = self._refusal(state, schedule, settings, timed=progress is not None)
        if refusal:
            return Due(True, partial(self._fall_back, inputs, state, refusal, record))
        owner: StreamOwner = state if session is None else session
        table = owner.table(self)
        candidates = processes(settings.prediction, settings.alphas_cumprod)
        whose = Inquiry(
            self.programs.signature, inputs, owner, table, progress, schedule, candidates,
            begin=partial(self._begin, table), learns_scale=settings.guidance_scale is None,
        ).owner()  # fmt: skip
        if table.begun == fallbacks.IDLE_AFTER and schedule.forecasts:
            state.say(logger, fallbacks.IDLE)
        if isinstance(whose, str):
            selects = schedule.selects
            return Due(True, partial(self._fall_back, inputs, state, whose, record, selects))
        follow(whose.stream, scheduler_of(state, session), whose.time, state)
        call = Call(
            programs=self.programs,
            pool=self.pool,
            owner=owner,
            table=table,
            stream=whose.stream,
            state=state,
            settings=_with_scale(settings, whose.stream),
            schedule=schedule,
            inputs=inputs,
            time=whose.time,
            reading=whose.reading,
            candidates=candidates,
            known=self.known_times,
            learned=self._learned_times,
            record=record,
        )
        count = tokens_due(call)
        make = partial(self._make, call, count, progress)
        return Due(True, make) if count else Due(False, make, partial(self._agree, call, progress))

    def _agree(self, call: Call, progress: Progress | None) -> list[Tensor]:
        """Compute an evaluation that others compute."""
        call.state.counters.fallbacks[AGREED] += 1
        call.keep(kind="dense", reason=AGREED)
        return self._make(call, call.schedule.tokens, progress)

    def _make(self, call: Call, count: int, progress: Progress | None) -> list[Tensor]:
        try:
            outputs = answer(call, count)
        except Fault as error:
            self._fault = f"internal error: {error}"
            call.table.drop(call.stream)
            logger.warning("specdiff failed on a graph, which runs dense", exc_info=True)
            outputs = self._fall_back(call.inputs, call.state, self._fault, call.record)
        except BaseException:
            # Half an evaluation leaves caches and history that belong to no point in time.
            call.table.drop(call.stream)
            raise
        if progress is not None:
            progress.advance(call.stream, self._time_input(call.inputs))
        return outputs

    def _schedule(self, settings: Settings) -> Schedule:
        signature = self.programs.signature
        return Schedule.of(settings, signature.lengths, selectable=not signature.unselectable)

    def _refusal(
        self, state: ModelState, schedule: Schedule, settings: Settings, *, timed: bool
    ) -> str | None:
        """Why no call can be anything but dense, if so."""
        if self._state is None and named_rows(state):
            return ROWS_UNATTACHED
        budget = settings.max_cache_bytes
        return self._fault or fallbacks.of_graph(
            self.programs.signature, schedule, budget, timed=timed
        )

    def _begin(
        self, table: StreamTable, before: Stream | None, conditions: Sequence[object]
    ) -> Stream:
        tokens = self.programs.signature.tokens
        history = History(tokens.shape[0], tokens.shape[1], tokens.device)
        return table.start(conditions, history, next(self._generations), replacing=before)

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
            tokens = programs.dense(inputs, self.pool.scratch()).tokens
        else:
            tokens = programs.probe(inputs)
        return owned(programs.tail(inputs, tokens))

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
        owner: StreamOwner = state if session is None else session
        table, conditions = owner.table(self), [inputs[index] for index in self._conditions]
        lanes = table.lanes(conditions)
        stream = lanes[-1] if lanes else None
        if session is not None and session.progress is not None:
            begin = partial(self._begin, table, stream, conditions)
            session.progress.pass_over(stream, begin, self._time_input(inputs))
        else:
            for lane in lanes:
                table.drop(lane)
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


def _with_scale(settings: Settings, stream: Stream) -> Settings:
    """The settings, with the scale that the stream's steps showed where nobody told it."""
    shown = stream.fit.scale.value
    if shown is None or settings.guidance_scale is not None:
        return settings
    return dataclasses.replace(settings, guidance_scale=shown)
