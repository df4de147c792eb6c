"""One evaluation of one stream: run the program that the schedule picks, merge, remember."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdiff.options import Settings
from specdiff.program import Programs, Signature
from specdiff.runtime.caches import CachePool
from specdiff.runtime.clock import next_time, time_unit
from specdiff.runtime.correction import Correction, on_top
from specdiff.runtime.forecast import forecast
from specdiff.runtime.history import ComputedOutput
from specdiff.runtime.importance import (
    least_important,
    log_scores,
    most_important,
    per_sample,
)
from specdiff.runtime.noise import Process
from specdiff.runtime.prediction import (
    Displacement,
    Prediction,
    Ways,
    guided,
)
from specdiff.runtime.reading import Reading
from specdiff.runtime.recording import StepRecord
from specdiff.runtime.registry import ModelState
from specdiff.runtime.schedule import Place, Schedule
from specdiff.runtime.speculation import landings, model_time, speculate
from specdiff.runtime.streams import Stream, StreamTable
from specdiff.runtime.times import KnownTimes

logger = logging.getLogger(__name__)

FIRST_ORDER_FIT = 5e-3
"""Relative residual of a first-order step, from float32 inner products."""
PROOF = 4.0
"""Change of a prediction, as a multiple of what a first-order step may miss, that shows in the step
of a sampler that uses the one before it again: half of it in Adams-Bashforth's."""
BUDGET = "cache budget exceeded"
NO_FIT = (
    "no speculation or correction: the sampler's steps fit neither a flow nor DDIM on a usual noise"
    " schedule"
    " (if batches hold both halves of classifier-free guidance, give guidance_scale;"
    " for another schedule, give its alphas_cumprod)"
)


@dataclass(frozen=True)
class Step:
    """One call of a graph that belongs to a stream."""

    programs: Programs
    pool: CachePool
    table: StreamTable
    stream: Stream
    state: ModelState
    settings: Settings
    schedule: Schedule
    inputs: Sequence[object]
    time: float
    """Time of this evaluation: the model's input, or the session's list if it gave one."""
    reading: Reading | None
    """What was read from the device; None if the session gave the times."""
    given: tuple[float, ...] | None
    """All times of the run, if the session gave them."""
    candidates: tuple[Process, ...]
    """What the sampler may be doing."""
    known: KnownTimes
    """Time inputs of earlier generations."""
    record: StepRecord | None = None
    """What is to be kept of this evaluation, if anything records."""

    def run(self) -> list[Tensor]:
        """Answer the call: the graph's outputs, safe from later evaluations."""
        stream, counters = self.stream, self.state.counters
        batch, count = self.programs.signature.batch, self._decide()
        before = stream.history.computed
        self._settle()
        if count == self.schedule.tokens:
            tokens = self._dense()
            counters.dense += 1
        elif count:
            tokens = self._selective(count)
            counters.selective += 1
        else:
            tokens = self._skip()
            counters.skipped += 1
        stream.joint = self.reading.joint if self.reading is not None else None
        if self._corrects and before:
            tokens = self._corrected(before, tokens, computed=count > 0)
        stream.times.append(self.time)
        self.table.touch(stream)
        counters.tokens_computed += batch * count
        counters.tokens_total += batch * self.schedule.tokens
        counters.token_counts = stream.history.counts
        # Tail may return a view of the history, or a buffer that its next run overwrites.
        outputs = [output.clone() for output in self.programs.tail(self.inputs, tokens)]
        self._look_ahead(outputs)
        return outputs

    @property
    def _shared(self) -> bool:
        return self.settings.guidance_scale is not None

    @property
    def _latent(self) -> Tensor:
        latent = self.inputs[self.programs.signature.latent]
        assert isinstance(latent, Tensor)
        return latent

    def _decide(self) -> int:
        """Tokens to compute; all of them if a selective step would have no caches."""
        tokens, times = self.schedule.tokens, [*self.stream.times, self.time]
        place = Place.of(times, self.given, self.schedule.usual)
        count, reason = self.schedule.decide(place)
        if 0 < count < tokens and not self.stream.lease:
            count, reason = tokens, "no caches yet"
        self._keep(
            batch=self.programs.signature.batch,
            tokens=tokens,
            kind="dense" if count == tokens else "selective" if count else "skipped",
            reason=reason,
            generation=self.stream.number,
            index=place.index,
            time=self.time,
        )
        return count

    def _keep(self, **found: object) -> None:
        """Fill in fields of the record, if there is one."""
        if self.record is not None:
            for name, value in found.items():
                setattr(self.record, name, value)

    def _dense(self) -> Tensor:
        stream = self.stream
        # A key seen once costs nothing: caches are for trajectories that go on.
        if self.schedule.selects and stream.history.evaluations > 0:
            self._ensure_lease()
        if self.schedule.selects:
            caches = stream.lease.caches if stream.lease else self.pool.scratch()
            if stream.lease:
                stream.lease.rows.renew(self.programs.signature, self.inputs)
            evaluation = self.programs.dense(self.inputs, caches)
            tokens = evaluation.tokens
            assert evaluation.importance is not None  # a dense run measures it
            stream.importance = per_sample(evaluation.importance, self._shared)
            self._keep(importance=stream.importance)
        else:
            tokens = self.programs.probe(self.inputs)
        tokens = tokens.clone()  # the program's next run may overwrite them
        stream.history.record_dense(self.time, tokens)
        return tokens

    @property
    def _corrects(self) -> bool:
        return (
            self.settings.correction
            and self.stream.first_order
            and self.schedule.forecasts
            and self.programs.signature.additive
        )

    def _settle(self) -> None:
        """Note what the sampler's step since the previous evaluation has made of its forecasts."""
        stream = self.stream
        if not self._corrects:
            stream.correction = None  # what it knows grows old while nothing keeps it up
        if stream.correction is None or stream.sampler is None:
            return
        if self._seen is not None and not self._is_first_order(self._seen):
            stream.correction, stream.first_order = None, False
        else:
            step = stream.sampler.step(stream.times[-1], self.time, self._seen)
            stream.correction.settle(*step)
            if self.reading is not None and (joint := self.reading.joint):
                stream.proven |= joint.news.item() > PROOF * self._allowed(joint.moved)

    @property
    def _seen(self) -> Displacement | None:
        """The sampler's step since the previous evaluation, by both halves of guidance if known."""
        if self.reading is None:
            return None
        return self.reading.joint.moved if self.reading.joint else self.reading.moved

    def _is_first_order(self, seen: Displacement) -> bool:
        """Whether the last step follows from the last prediction alone, as far as rounding shows.

        A solver of higher order uses earlier predictions again, what was put on top of them too.
        """
        allowed, start = self._allowed(seen), self.stream.times[-1]
        chosen = self.stream.sampler.chosen if self.stream.sampler is not None else None
        # The usual case, in a few numbers of the host.
        if chosen and seen.misfit(*chosen, start, self.time) <= allowed:
            return True
        return seen.residual(self.candidates, start, self.time) <= allowed

    def _allowed(self, seen: Displacement) -> float:
        """What a first-order step may miss, relative to its length."""
        rounding = torch.finfo(self._latent.dtype).eps / max(seen.change.item(), 1e-6)
        return FIRST_ORDER_FIT + 2 * rounding

    @property
    def _doubted(self) -> bool:
        """Whether the sampler may be one that uses earlier predictions again, for all that is seen.

        With two predictions a step is explained more easily, and a wrong correction costs more than
        the wait: nothing is put on top until a step could have shown another order.
        """
        paired = self.reading is not None and self.reading.joint is not None
        return paired and not self.stream.proven

    def _corrected(
        self, before: Sequence[ComputedOutput], tokens: Tensor, *, computed: bool
    ) -> Tensor:
        """`tokens`, and on top of those just computed what their forecasts had cost the latent."""
        stream, newest = self.stream, self.stream.history.computed[0]
        if stream.correction is None:
            stream.correction = Correction.none(newest)
        elif stream.sampler is not None and computed:
            older = before[1] if len(before) > 1 else None
            missing = stream.correction.collect(before[0], older, newest)
            due = next_time([*stream.times, self.time], self.given)
            more = on_top(missing, *stream.sampler.step(self.time, due))
            if not self._doubted:  # else it stays missing, to be put on top later
                tokens = (tokens.float() + more).to(tokens.dtype)
        stream.correction.hand_out(newest, tokens, self.time)
        return tokens

    def _ensure_lease(self) -> None:
        if self.stream.lease is None:
            self.table.release_idle(self.stream)
            self.stream.lease = self.pool.lease(self.settings.max_cache_bytes)
        if self.stream.lease is None:
            self.state.counters.fallbacks[BUDGET] += 1
            self.state.say(logger, f"max_cache_bytes={self.settings.max_cache_bytes}: {BUDGET}")

    def _selective(self, count: int) -> Tensor:
        stream, settings = self.stream, self.settings
        assert stream.lease is not None and stream.importance is not None
        future = stream.future(self.time)
        scores = log_scores(settings, stream.importance, future, stream.history, self.time)
        lengths = self.programs.signature.lengths
        active = most_important(scores, count, self._shared, lengths)
        predicted = self._forecast()
        if settings.reuse_share > 0:
            reused = least_important(scores, settings.reuse_share, active)
            previous = stream.history.steps[0].tokens
            predicted = torch.where(reused.unsqueeze(-1), previous, predicted)
            self._keep(reused=reused)
        text = self.schedule.text(stream.history.selective)
        caches, tables, moment = stream.lease.caches, stream.lease.rows, (self.given, self.time)
        row = tables.look_up(self.programs, self.inputs, caches, moment, self.known)
        evaluation = self.programs.selective(
            self.inputs,
            caches,
            active,
            text=text,
            importance=settings.selective_importance,
            row=row,
        )
        rows = active.unsqueeze(-1).expand_as(evaluation.tokens)
        merged = predicted.scatter(1, rows, evaluation.tokens.to(predicted.dtype))
        merged = self._with_invalid_rows(merged)
        if row is not None and self.reading is None:
            merged = tables.checked(merged, self.programs.signature, self.inputs, moment)
        if evaluation.importance is not None:
            stream.importance = per_sample(evaluation.importance, self._shared)
            self._keep(importance=stream.importance)
        self._keep(active=active, scores=scores)
        stream.history.record_selective(self.time, merged, active)
        return merged

    def _skip(self) -> Tensor:
        predicted = self._with_invalid_rows(self._forecast())
        self.stream.history.record_skipped(self.time, predicted)
        return predicted

    def _forecast(self) -> Tensor:
        unit = time_unit([*(self.given or self.stream.times), self.time])
        return forecast(self.settings.forecast, self.stream.history, self.time, unit)

    def _with_invalid_rows(self, tokens: Tensor) -> Tensor:
        """`tokens` [B, N, C], NaN where the model would be: in rows whose latent is not finite."""
        if self.reading is not None:
            return tokens  # the latent was read and is finite
        batch, latent = len(tokens), self._latent.float()
        rows = latent.reshape(batch if len(latent) == batch else 1, -1).sum(1) * 0
        return tokens + rows.to(tokens.dtype)[:, None, None]

    def _look_ahead(self, outputs: Sequence[Tensor]) -> None:
        """Keep what the next evaluation's fit needs, and speculate once time has moved."""
        stream, times = self.stream, self.stream.times
        pending = self._wants_future() or (self._corrects and stream.sampler is None)
        before = stream.latents, stream.predictions, stream.model_time
        if pending or self.reading is not None:
            signature = self.programs.signature
            stream.latents = tuple(p.clone() for p in moving_parts(signature, self.inputs))
            predicted = (pair.part(outputs[pair.velocity]) for pair in signature.denoised)
            scale = self.settings.guidance_scale
            stream.predictions = tuple(zip(*(guided(p, scale) for p in predicted), strict=True))
            stream.model_time = self._model_time()
        if pending and len(times) > 1 and times[-1] != times[-2]:
            self._infer(*before)
        if stream.sampler is not None and not self._wants_future() and self.reading is None:
            stream.latents = stream.predictions = ()
            stream.model_time = None

    def _wants_future(self) -> bool:
        return (
            self.settings.speculative_steps > 1
            and not self.stream.looked_ahead
            and self.schedule.selects
            and self.programs.signature.time is not None
        )

    def _model_time(self) -> Tensor:
        index = self.programs.signature.time
        time = self.inputs[index] if index is not None else self.time
        return torch.as_tensor(time, device=self._latent.device).float().flatten()[0].clone()

    def _infer(self, latents: tuple[Tensor, ...], predictions: Ways, time: Tensor | None) -> None:
        """Infer the sampler from the previous evaluation, given by its parts; look ahead."""
        stream = self.stream
        if not latents or time is None or stream.model_time is None:
            return
        if len(predictions) != len(stream.predictions):
            return  # guidance was set or unset in between
        stream.sampler = self._inferred(latents, predictions)
        if self.reading is not None and not stream.sampler.trusted:
            self.state.say(logger, NO_FIT)
        elif self._wants_future():
            stream.looked_ahead = True
            self._speculate(stream.sampler, time)

    def _speculate(self, prediction: Prediction, time: Tensor) -> None:
        """Look ahead; `time` was the previous evaluation's time input."""
        stream, times = self.stream, self.stream.times
        landed = landings(times, self.settings.speculative_steps, self.given)
        places = [(landing, self._input_at(landing, time)) for landing in landed]
        scratch = self.pool.scratch()
        speculate(self.programs, scratch, self.inputs, stream, prediction, places, self._shared)
        self.state.counters.speculative += len(places)
        self._keep(speculative=len(places))
        tokens = self.programs.signature.batch * self.schedule.tokens
        self.state.counters.tokens_computed += len(places) * tokens

    def _inferred(self, latents: tuple[Tensor, ...], predictions: Ways) -> Prediction:
        """What the sampler did since the previous evaluation, given by its parts."""
        stream, (start, end) = self.stream, self.stream.times[-2:]
        seen = self._seen
        if seen is None:
            seen = Displacement.of(stream.latents, latents, predictions)
        unit, exact = time_unit(self.given or stream.times), self.given is not None
        return Prediction.infer(seen, self.candidates, start, end, unit, exact=exact)

    def _input_at(self, landing: float, previous: Tensor) -> float | Tensor:
        """The time input at a landing; `previous` was that of the previous evaluation."""
        start, end = self.stream.times[-2:]
        if self.reading is not None or self.stream.model_time is None:
            return landing
        return model_time(landing, (start, end), (previous, self.stream.model_time))


def moving_parts(signature: Signature, inputs: Sequence[object]) -> tuple[Tensor, ...]:
    """Of every input that is denoised, what its prediction moves: views."""
    latents = [(pair, inputs[pair.latent]) for pair in signature.denoised]
    return tuple(pair.part(latent) for pair, latent in latents if isinstance(latent, Tensor))
