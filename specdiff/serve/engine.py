"""Engine: many generations of one model at a time, in this process.

A thread for each generation in progress runs a pipeline of its own around a stand-in for the
denoiser. So no pipeline is edited, and whatever one does between two calls it does as ever.
"""

from __future__ import annotations

import io
import logging
import math
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import fmean
from typing import Any

from torch import Tensor

import specdiff
from specdiff.errors import described
from specdiff.models.picture_model import STEPS, Order, OrderError, PictureModel
from specdiff.serve.events import Card, Counts, Event, Failure, Picture, Progress
from specdiff.serve.generation import Cancelled, Generation, Preparation, Tell
from specdiff.serve.heap import give_back
from specdiff.serve.joining import call_of
from specdiff.serve.rounds import Evaluate, Rounds, Waiting, by_rows
from specdiff.serve.stand import StandIn
from specdiff.settings import OFF, QUALITIES

logger = logging.getLogger(__name__)

CHOICES = (OFF, *QUALITIES)
MOST_FAILURES = 3
"""Calls that fail in a row, after which the engine is taken for broken."""
LONGEST_RETRY = 60
"""Seconds that a client is asked to stay away, at most."""
WARM_UP_STEPS = 4


class Engine:
    """Draws orders, some at a time, others in a queue.

    Args:
        model: What draws them. Its denoiser is attached to specdiff until `close`.
        quality: Of orders that name none.
        running: Generations in progress, at most.
        waiting: Generations in the queue, at most.
        max_cache_bytes: What generations in progress keep for forecasts, at most.
        evaluate: How calls of several generations are answered.
    """

    def __init__(
        self,
        model: PictureModel,
        quality: str = "balanced",
        running: int = 8,
        waiting: int = 64,
        max_cache_bytes: int | None = None,
        evaluate: Evaluate = by_rows,
    ) -> None:
        self.model = model
        self.quality = quality
        self.most_running = running
        self.most_waiting = waiting
        self._name = uuid.uuid4().hex[:8]
        self._attachment = specdiff.attach(
            model.denoiser, quality=quality, max_cache_bytes=max_cache_bytes
        )
        self._rounds = Rounds(model.denoiser, evaluate, running)
        self._threads = ThreadPoolExecutor(running, thread_name_prefix="specdiff-draw")
        # Text encoders' tokenizers are not made for two threads at a time.
        self._preparing = threading.Lock()
        self._lock = threading.Lock()
        self._held = self._drawing = 0
        self._seconds: deque[float] = deque(maxlen=32)
        self._why_cold = "the first picture is being drawn"
        """Empty once it has been drawn."""

    def submit(self, order: Order, quality: str | None, tell: Tell) -> Generation | Failure:
        """Put an order into the queue, or say why not."""
        if quality is not None and quality not in CHOICES:
            return Failure("refused", f"quality: must be one of {', '.join(CHOICES)}", "quality")
        try:
            self.model.check(order)
        except OrderError as error:
            return Failure("refused", str(error), error.field)
        with self._lock:
            if self._held >= self.most_running + self.most_waiting:
                text = f"{self._held} pictures are being drawn or wait already"
                return Failure("full", text, retry_after=self._retry_after())
            self._held += 1
        generation = Generation(order, quality, tell)
        self._rounds.announce(generation)
        self._threads.submit(self._draw, generation)
        return generation

    def warm_up(self) -> None:
        """Draw pictures of the usual size, one and then two together; then the engine is ready.

        The first of each kind are slow, above all where the model is compiled.
        """
        model = self.model
        prompt = (model.prompts or ("a red apple",))[0]
        order = Order(prompt, model.side, model.side, WARM_UP_STEPS, seed=0)
        first = self._last_events([order])
        both = self._last_events([order] * 2) if self.most_running > 1 else []
        # While two are drawn clients may have filled the queue: that is no fault.
        why = [f"the first picture failed: {each.message}" for each in failures(first)]
        self._why_cold = "".join(why)
        if failed := failures([*first, *both]):
            logger.error("the first pictures failed: %s", failed)

    def _last_events(self, orders: Sequence[Order]) -> list[Event]:
        """Draw orders together; the last event of each."""
        ended: queue.SimpleQueue[Event] = queue.SimpleQueue()

        def tell(event: Event) -> None:
            if not isinstance(event, Progress):
                ended.put(event)

        started = [self.submit(order, None, tell) for order in orders]
        failed: list[Event] = [each for each in started if isinstance(each, Failure)]
        return failed + [ended.get() for _ in range(len(orders) - len(failed))]

    def why_not_ready(self) -> str:
        """Why no picture can be drawn now; empty if one can."""
        return self.why_broken() or self._why_cold

    def why_broken(self) -> str:
        """Why none ever will be again; empty if that is not so."""
        if not self._rounds.alive:
            return "the engine has stopped"
        failed = self._rounds.failed_in_a_row
        return f"the last {failed} calls of the model failed" if failed >= MOST_FAILURES else ""

    def card(self) -> Card:
        """What is served."""
        m = self.model
        return Card(m.name, m.side, m.sides, m.grid, STEPS, self.quality, m.prompts, m.any_prompt)

    def counts(self) -> Counts:
        """What was done so far."""
        stats = specdiff.stats(self.model.denoiser)
        steps = {kind: getattr(stats, kind) for kind in ("dense", "selective", "skipped")}
        rounds, running = self._rounds, self._drawing
        return Counts(
            self._name, steps, stats.fallbacks, rounds.calls, rounds.rows,
            stats.cache_bytes + stats.kept_bytes, running, self._held - running,
        )  # fmt: skip

    def close(self) -> None:
        """Stop everything, and leave the model as it was."""
        self._rounds.close()
        self._threads.shutdown(cancel_futures=True)
        self._attachment.detach()

    def _retry_after(self) -> int:
        each = fmean(self._seconds) if self._seconds else 1.0
        return min(max(math.ceil(each * self._held / self.most_running), 1), LONGEST_RETRY)

    def _draw(self, generation: Generation) -> None:
        """In a thread of its own: from the order to the last event."""
        with self._lock:
            self._drawing += 1
        event: Event | None = None
        try:
            event = self._drawn(generation)
        except Cancelled:
            logger.debug("a generation was stopped after %d calls", generation.calls)
        except Exception as error:
            logger.warning("a generation failed", exc_info=error)
            event = Failure("broken", described(error))
        self._rounds.expect(generation, False)
        generation.session = None
        with self._lock:
            self._drawing -= 1
            self._held -= 1
            is_idle = not self._held
        if event is not None:
            generation.tell(event)
        if is_idle:
            give_back()

    def _drawn(self, generation: Generation) -> Event:
        if generation.is_cancelled:
            raise Cancelled
        began = time.monotonic()
        with Preparation(self._preparing) as preparation:
            answer = partial(self._answer, generation, preparation)
            pipeline = self.model.beside(StandIn(self.model.denoiser, answer))
            generation.scheduler = pipeline.scheduler
            picture = self.model.draw(generation.order, pipeline)
        if not picture.isfinite().all():
            return Failure("broken", "the picture holds values that are not finite")
        png = png_of(picture)
        self._seconds.append(time.monotonic() - began)
        return Picture(png, time.monotonic() - generation.began, self.counts())

    def _answer(
        self,
        generation: Generation,
        preparation: Preparation,
        part: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """What the denoiser returns to a pipeline."""
        preparation.end()
        steps = len(generation.scheduler.timesteps)
        session, shares = generation.session_of(self.model.denoiser, part)
        generation.calls += 1
        waiting = Waiting(call_of(args, kwargs), session, shares, begins=generation.calls == 1)
        self._rounds.expect(generation, True)
        output = generation.wait(waiting, self._rounds)
        if generation.calls >= steps * len(generation.parts):
            self._rounds.expect(generation, False)
        step = math.ceil(generation.calls / len(generation.parts))
        generation.tell(Progress(step, steps))
        return output


def failures(events: Iterable[Event]) -> list[Failure]:
    """Those that are no pictures."""
    return [event for event in events if isinstance(event, Failure)]


def png_of(picture: Tensor) -> bytes:
    """A picture `[H, W, 3]` in 0..1 as a PNG."""
    from PIL import Image

    file = io.BytesIO()
    levels = (picture.clamp(0, 1) * 255).round().byte().numpy()
    Image.fromarray(levels).save(file, "png")
    return file.getvalue()
