"""The only process-wide state: which model has which runtime state, which sessions are active.

A model is known by its parameters, which both sides see: the user holds the module, the compiled
graph gets them as inputs. Neither side keeps the other alive.
"""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from specdiff.errors import NotCompiledError
from specdiff.options import Options, check_overrides
from specdiff.runtime.records.recording import Recording
from specdiff.runtime.records.stats import Counters
from specdiff.runtime.sampler.remains import Seen
from specdiff.runtime.sampler.scheduler import Scheduler
from specdiff.runtime.streams.progress import Progress
from specdiff.runtime.streams.stream import Stream
from specdiff.runtime.streams.table import StreamTable
from specdiff.settings import Settings

logger = logging.getLogger(__name__)

MOST_BESIDE = 12
"""Evaluations of other streams by which a step may be explained: of three that guide, four each."""
ELSEWHERE = (
    "a session is left in another context than it was entered in, so calls in between may have run"
    " without it: enter it in the thread, task or generator step that calls the model"
)
UNSEEN = (
    "no call of the model came to specdiff within a session: compile it with"
    ' backend="specdiff", or attach it, specdiff.attach(model)'
)


class StreamOwner:
    """Settings and streams of a model or of a session, one table of streams for every graph."""

    def __init__(self, *, keep_values: bool) -> None:
        self.overrides: dict[str, Any] = {}
        self.scheduler: Scheduler | None = None
        """What steps between the evaluations, if the user gave it."""
        self.resolved: tuple[Options, dict[str, Any], Settings] | None = None
        """What `effective` last made of which options and overrides."""
        self.kept_bytes = 0
        """What forecasts of rows keep, after the latest call of the model with rows."""
        self._keep_values = keep_values
        self._tables: weakref.WeakKeyDictionary[object, StreamTable] = weakref.WeakKeyDictionary()

    def table(self, graph: object) -> StreamTable:
        """The streams that `graph` has here."""
        tables = self._tables
        if graph not in tables:
            tables[graph] = StreamTable(keep_values=self._keep_values)
        return tables[graph]

    def beside(self, table: StreamTable) -> list[Stream]:
        """The streams of other graphs."""
        return [each for other in self._tables.values() if other is not table for each in other]

    def seen_beside(self, stream: Stream, past: Sequence[Seen]) -> list[Seen]:
        """What other streams saw when this one saw `past`: they may guide the same latent."""
        times = [seen.time for seen in past]
        shapes = [latent.shape for latent in stream.latents]
        seen = [
            seen
            for table in self._tables.values()
            for other in table
            if other is not stream
            for seen in other.trail.seen
            if seen.time in times and [latent.shape for latent in seen.latents] == shapes
        ]
        newest_first = sorted(seen, key=lambda each: times.index(each.time))
        return newest_first[:MOST_BESIDE]

    def streams(self) -> list[Stream]:
        """Of all graphs."""
        return [stream for table in self._tables.values() for stream in table]

    def forget_streams(self) -> None:
        """Drop all streams; their caches go back to their pools."""
        self._tables = weakref.WeakKeyDictionary()  # another thread may walk the old ones
        self.kept_bytes = 0


class ModelState(StreamOwner):
    """Everything the runtime keeps for one model."""

    def __init__(self) -> None:
        super().__init__(keep_values=False)
        self.counters = Counters()
        self.recordings: list[Recording] = []
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._walking = threading.Lock()
        """Held while sessions are added or walked."""
        self._numbers = itertools.count()
        self.graphs: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        """Graphs this model has run, with a hash of the parameters each of them takes."""
        self.parts_run: set[tuple[int, int]] | None = None
        """Of a model that breaks into graphs: those of its latest evaluation, and their owners."""
        self.refusals: set[str] = set()
        """Why calls of an attached module have no graph of these."""
        self.group: dist.ProcessGroup | None = None
        """Processes that compute a step if one of them does."""
        self.last_variant = False
        """Whether Dynamo compiles no more of the model, so that calls may run unseen."""
        self._said: set[str] = set()

    def enrol(self, session: Session) -> int:
        """Know a new session; its number, in the order in which they were made."""
        with self._walking:
            self._sessions.add(session)
            return next(self._numbers)

    def sessions(self) -> list[Session]:
        """Those that somebody holds, whatever threads make more of them."""
        with self._walking:
            return list(self._sessions)

    def why_no(self, ability: Literal["unplanned", "unselectable"]) -> str | None:
        """Why no graph of the model has an ability; empty if one has it, None where none has run.

        A graph that forecasts whole steps knows better than one that cannot.
        """
        graphs = [graph for graph in self.graphs if not graph.unplanned] or list(self.graphs)
        reasons = [getattr(graph, ability) for graph in graphs] or sorted(self.refusals)
        if not reasons:
            return None
        return "" if "" in reasons else "; ".join(dict.fromkeys(reasons))

    @property
    def unseen(self) -> bool:
        """Whether no call of the model has come to the runtime."""
        return not (self.graphs or self.refusals or self.counters.fallbacks)

    def count_dense(self, reason: str) -> None:
        """An evaluation ran dense for this reason."""
        self.counters.dense += 1
        self.counters.fallbacks[reason] += 1

    def say(self, logger: logging.Logger, message: str, level: int = logging.WARNING) -> None:
        """Log a message once in the life of this model."""
        if message not in self._said:
            self._said.add(message)
            logger.log(level, message)


class Session(StreamOwner):
    """A context in which a model's calls form streams of their own, under their own options.

    May be entered again after it was left: two generations that take turns, each under its own
    session, never mix. Made by `specdiff.session`.
    """

    def __init__(
        self,
        state: ModelState,
        times: tuple[float, ...] | None,
        options: Mapping[str, Any],
        scheduler: Scheduler | None = None,
    ) -> None:
        super().__init__(keep_values=True)
        self.state = state
        self.progress = None if times is None else Progress(times)
        self.overrides = check_overrides(options)
        self.scheduler = scheduler
        self.number = state.enrol(self)
        """In the order in which sessions of the model were made."""

    def __enter__(self) -> Session:
        _ACTIVE.set((*_ACTIVE.get(), self))
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        active = list(_ACTIVE.get())
        if self in active:
            del active[len(active) - 1 - active[::-1].index(self)]
            _ACTIVE.set(tuple(active))
        else:
            self.state.say(logger, ELSEWHERE)
        if kind is not None:  # an aborted generation is not gone on with
            self.abort()
        elif self.state.unseen:
            self.state.say(logger, UNSEEN)

    def abort(self) -> None:
        """Forget the generation: the next evaluation begins another."""
        self.forget_streams()
        self.progress = self.progress and Progress(self.progress.times)


class Rows:
    """A context that names the rows of a model's calls by their sessions. See `specdiff.rows`."""

    def __init__(self, state: ModelState, sessions: Sequence[Session]) -> None:
        self.state = state
        self.sessions = tuple(sessions)

    def __enter__(self) -> Rows:
        _ACTIVE.set((*_ACTIVE.get(), self))
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        _ACTIVE.set(tuple(each for each in _ACTIVE.get() if each is not self))
        if kind is None and self.state.unseen:
            self.state.say(logger, UNSEEN)


_STATES: WeakIdKeyDictionary = WeakIdKeyDictionary()
# Per thread and per asyncio task, so that concurrent users do not see each other's sessions.
_ACTIVE: ContextVar[tuple[Session | Rows, ...]] = ContextVar("specdiff_sessions", default=())


def state_of(owned: Iterable[object]) -> ModelState | None:
    """The state that the first known one of these, modules or parameters, belongs to."""
    for each in owned:
        state = _STATES.get(each)
        if isinstance(state, ModelState):
            return state
    return None


def create(parameters: Sequence[Tensor]) -> ModelState:
    """A new state, registered for all parameters of its model."""
    state = ModelState()
    for parameter in parameters:
        _STATES[parameter] = state
    return state


def require_module(value: object) -> None:
    """Raise NotCompiledError, saying what to give, for anything but a module."""
    if not isinstance(value, torch.nn.Module):
        raise NotCompiledError(
            f"a {type(value).__name__} is no torch.nn.Module: give the compiled model, such as"
            " pipe.transformer"
        )


def find_or_create(module: torch.nn.Module) -> ModelState:
    """The state of a module, registered for all its parameters if there is none yet.

    Raises:
        NotCompiledError: it is no module, or has no parameters by which its state can be found.
    """
    require_module(module)
    parameters = list(module.parameters())
    if not parameters:
        raise NotCompiledError(f"{type(module).__name__} has no parameters to be known by")
    state = state_of([module, *parameters]) or create(parameters)
    _STATES[module] = state  # offloading may swap the parameters
    return state


def first_parameter(inputs: Sequence[object], indices: Sequence[int]) -> torch.nn.Parameter | None:
    """The first parameter among the inputs at these positions; buffers are passed over."""
    values = (inputs[index] for index in indices)
    return next((value for value in values if isinstance(value, torch.nn.Parameter)), None)


def state_of_call(
    graph: object, inputs: Sequence[object], indices: Sequence[int], nameless: ModelState
) -> ModelState:
    """The state of the model that calls a graph.

    Args:
        graph: the callable.
        inputs: its flat inputs.
        indices: positions of parameters and buffers among them.
        nameless: returned if there are no parameters to know a model by.

    Returns:
        The state of the first parameter: later ones may be shared with another model.
    """
    first = first_parameter(inputs, indices)
    if first is None:
        return nameless
    state = state_of([first])
    if state is None or graph not in state.graphs:
        values = [inputs[index] for index in indices]
        parameters = [value for value in values if isinstance(value, torch.nn.Parameter)]
        state = state or create(parameters)
        state.graphs[graph] = hash(tuple(id(parameter) for parameter in parameters))
    return state


def active_session(state: ModelState) -> Session | None:
    """The innermost session of this model that is entered in this thread or task."""
    context = _innermost(state)
    return context if isinstance(context, Session) else None


def _innermost(state: ModelState) -> Session | Rows | None:
    return next((each for each in reversed(_ACTIVE.get()) if each.state is state), None)


def scheduler_of(state: ModelState, session: Session | None) -> Scheduler | None:
    """What steps between evaluations: the session's, over the model's."""
    given = session.scheduler if session is not None else None
    return given or state.scheduler


def named_rows(state: ModelState) -> tuple[Session, ...]:
    """The session of each row of this model's calls; none if they are not named."""
    context = _innermost(state)
    return context.sessions if isinstance(context, Rows) else ()


def effective(options: Options, state: ModelState, session: Session | None) -> Settings:
    """Settings of a call: the session's, over the model's, over those it was compiled with."""
    owner: StreamOwner = state if session is None else session
    overrides = state.overrides if session is None else {**state.overrides, **session.overrides}
    known = owner.resolved
    if known is None or known[0] is not options or known[1] != overrides:
        known = options, dict(overrides), options.override(overrides).resolve()
        owner.resolved = known
    return known[2]
