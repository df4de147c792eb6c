"""What users call, by a model's parameters: `stats`, `reset`, `configure`, `session` and others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specdiff.errors import NotCompiledError, OptionError
from specdiff.options import Options, check_overrides
from specdiff.runtime.blocks.attach import Attachment
from specdiff.runtime.blocks.watched import unwatch
from specdiff.runtime.records.recording import Recording
from specdiff.runtime.records.stats import Counters, Stats
from specdiff.runtime.sampler.scheduler import Scheduler
from specdiff.runtime.step.dispatch import Runtime
from specdiff.runtime.streams.registry import (
    ModelState,
    Rows,
    Session,
    find_or_create,
    require_module,
    state_of,
)
from specdiff.runtime.streams.time_tables import KnownTimes


def stats(compiled: torch.nn.Module) -> Stats:
    """What the runtime has done for a model since it was compiled or reset.

    Raises:
        NotCompiledError: the model has not run under this backend, nor been configured.
    """
    state = _known_state(compiled)
    counters, runtimes = state.counters, _runtimes(state)
    seconds: Counter[str] = Counter()
    for runtime in runtimes:
        seconds.update(runtime.programs.compile_seconds)
    return Stats(
        dense=counters.dense,
        selective=counters.selective,
        skipped=counters.skipped,
        speculative=counters.speculative,
        tokens_computed=counters.tokens_computed,
        tokens_total=counters.tokens_total,
        cache_bytes=sum(runtime.pool.nbytes for runtime in runtimes),
        kept_bytes=sum(session.kept_bytes for session in state.sessions()),
        fallbacks=dict(counters.fallbacks),
        graphs=len(state.graphs),
        recompiles=len(state.graphs) - len(set(state.graphs.values())),
        compile_seconds=dict(seconds),
        token_counts=counters.token_counts and counters.token_counts(),
        no_step_plan=state.why_no("unplanned"),
        no_selection=state.why_no("unselectable"),
        last_variant=state.last_variant,
    )


def reset(compiled: torch.nn.Module) -> None:
    """Forget all streams, those of sessions included, idle caches and counters; keep settings.

    Raises:
        NotCompiledError: the model has not run under this backend, nor been configured.
    """
    state = _known_state(compiled)
    for owner in (state, *state.sessions()):
        owner.forget_streams()
    state.counters = Counters()
    for runtime in _runtimes(state):
        runtime.pool.drop_idle()
        runtime.known_times = KnownTimes()


def configure(compiled: torch.nn.Module, **options: Any) -> None:
    """Change options of a model, from the next evaluation on, without recompiling.

    Works before the first call, too. None returns an option to its default.

    Args:
        compiled: the compiled model.
        options: by name; and `scheduler`, as of `attach`.

    Raises:
        OptionError: an unknown name, an option fixed at compile time, or a value out of range.
        NotCompiledError: the module has no parameters to be known by.
    """
    known = {"scheduler": _scheduler(options.pop("scheduler"))} if "scheduler" in options else {}
    overrides, state = check_overrides(options), find_or_create(compiled)
    state.overrides.update(overrides)
    state.scheduler = known.get("scheduler", state.scheduler)


def record(compiled: torch.nn.Module, *, latents: bool = False) -> Recording:
    """A context that keeps what every evaluation of the model does: `Recording.steps`.

    Nothing waits for the device until something is read. Keeps a few tensors of [B, N] a step, and
    with `latents` a copy of what was denoised, except in fallbacks.

    Raises:
        NotCompiledError: the module has no parameters to be known by.
    """
    return Recording(find_or_create(compiled).recordings, latents=latents)


def attach(
    model: torch.nn.Module,
    scheduler: Any = None,
    group: torch.distributed.ProcessGroup | None = None,
    tokens: str | None = None,
    **options: Any,
) -> Attachment:
    """Accelerate the calls of a module from outside, whatever runs inside it.

        specdiff.attach(pipe.transformer)

    For models that `backend="specdiff"` cannot accelerate in one graph: compiled by others or not
    at all, broken into graphs, quantised, offloaded, sharded. Whole steps are computed or forecast.
    Where the blocks were compiled one by one, tokens can be selected, too:

        model.compile_repeated_blocks(backend="specdiff", fullgraph=True)
        specdiff.attach(model, cache_ratio=0.75)

    Attach before or after compiling in place (`model.compile()`) and before or after hooks; where
    `torch.compile(model)` returned another module, attach that one. `stats`, `reset`, `configure`,
    `session` and `rows` take `model`. Each call shape is looked at once, by one forward more.

    Args:
        model: the module that is called at every step.
        scheduler: what the pipeline steps with, such as `pipe.scheduler`. It is read when a
            generation begins and never changed: the times are known from the start, and what
            forecasts cost is made good exactly, by multistep samplers too.
        group: processes that share the model while each draws pictures of its own, as under FSDP
            (`torch.distributed.group.WORLD`): all compute a step if one of them has to. Costs an
            exchange a call. Not needed where all ranks see the same latents.
        tokens: the argument of the blocks that holds the picture's tokens, such as "hidden_states",
            where blocks are compiled one by one and shapes do not tell: a prompt has as many
            tokens, or as many as the picture in larger patches. What cannot be told is said.
        options: as of `configure`, and `timestep_arg`.

    Returns:
        What `detach()` undoes; so do `specdiff.detach(model)` and attaching again.

    Raises:
        OptionError: an unknown option or a value out of range.
    """
    check_overrides({k: v for k, v in options.items() if k != "timestep_arg"})
    known = _scheduler(scheduler)
    detach(model)
    state = find_or_create(model)
    state.scheduler, state.group = known, group
    return Attachment(model, Options.parse(options, frozenset())[0], state, tokens)


def detach(model: torch.nn.Module) -> None:
    """Undo `attach`; nothing if the module is not attached."""
    require_module(model)
    unwatch(model)


def session(
    compiled: torch.nn.Module,
    timesteps: Tensor | Sequence[float] | None = None,
    scheduler: Any = None,
    **options: Any,
) -> Session:
    """A context whose calls of the model form streams of their own, under their own options.

    Args:
        compiled: the compiled model.
        timesteps: time of every evaluation of one generation in order, repeats included (Heun),
            as the scheduler or the model has them, without the final time that is not evaluated.
            With it no value is read back from the device (but one time input where another prompt
            or graph turns up, or one is left out), and a new generation begins when all times are
            used up: one at a time. One that ends in an exception which leaves the context is
            forgotten; after any other that was cut short take a new session. The same times must
            stand for the same time inputs of the model in every session, until `reset`: where they
            do not, selective steps give NaN. Without it times are read, and conditions made anew
            at every call are compared by value.
        scheduler: as of `attach`, of this session's generations.
        options: override those of the model while the session is active.

    Raises:
        OptionError: options as in `configure`, or times that are empty, not finite, or not in
            one direction.
        NotCompiledError: the module has no parameters to be known by.
    """
    times = None if timesteps is None else _checked(timesteps)
    return Session(find_or_create(compiled), times, options, _scheduler(scheduler))


def _scheduler(given: Any) -> Scheduler | None:
    return None if given is None else Scheduler(given)


def rows(compiled: torch.nn.Module, sessions: Sequence[Session]) -> Rows:
    """A context that names the rows of the model's calls, for servers that batch by step.

        requests = [specdiff.session(model, timesteps=times, quality="fast"), ...]
        with specdiff.rows(model, requests):
            velocities = model(latents, times)  # a row for each request, each at its own step

    Each session is one trajectory with its own plan, settings and history: the rows of a batch may
    be at any steps, join, leave and change places. Rows that are due are computed together, in
    batches of 1, 2, 3, 4, 6, 8, 12 ... rows, and the others forecast, so that skipping is
    throughput. The batch is the first axis of the inputs. Both halves of guidance are two rows of
    one session. The model has to be attached (`specdiff.attach(model)`), compiled or not. Inputs
    may be overwritten after the call. A call that the model ends with an exception may be repeated.
    A session that nobody holds any more leaves nothing behind.

    Args:
        compiled: the attached model.
        sessions: of each row, made by `specdiff.session`; with `timesteps`, or times are read.

    Raises:
        OptionError: no sessions, or one of another model; in a call: not as many as rows.
        NotCompiledError: the module has no parameters to be known by.
    """
    state = find_or_create(compiled)
    if not sessions:
        raise OptionError("rows: give one session for each row of the batch")
    for place, each in enumerate(sessions):
        if getattr(each, "state", None) is not state:
            raise OptionError(f"rows: item {place} is no session of this model")
    return Rows(state, sessions)


def _known_state(compiled: torch.nn.Module) -> ModelState:
    require_module(compiled)
    state = state_of([compiled, *compiled.parameters()])
    if state is None:
        raise NotCompiledError(
            f"{type(compiled).__name__} has not run under torch.compile(backend='specdiff')"
        )
    return state


def _runtimes(state: ModelState) -> list[Runtime]:
    return [graph for graph in state.graphs if isinstance(graph, Runtime)]


def _checked(timesteps: Tensor | Sequence[float]) -> tuple[float, ...]:
    try:
        times = torch.as_tensor(timesteps, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError("timesteps: must be a list or a tensor of numbers") from error
    if times.ndim != 1:
        raise OptionError(f"timesteps: must have one axis, not the shape {list(times.shape)}")
    steps = times.diff()
    if not len(times) or not times.isfinite().all():
        raise OptionError("timesteps: must be finite numbers, at least one")
    if (steps > 0).any() and (steps < 0).any():
        raise OptionError("timesteps: must fall or rise throughout; repeats are allowed")
    return tuple(times.tolist())
