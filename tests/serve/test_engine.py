"""The engine without a server in front: guidance in separate calls, lists of events, an end."""

from __future__ import annotations

import gc
import queue
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from specdiff.models.picture_model import Order, PictureModel, load_folder, of_pipeline
from specdiff.runtime.streams.registry import Session
from specdiff.runtime.streams.stream import Stream
from specdiff.serve.engine import Engine
from specdiff.serve.events import Event, Failure, Picture, Progress
from specdiff.serve.generation import Generation
from tests.examples.small import flux_folder, sd3_folder
from tests.serve.served import until

CPU = torch.device("cpu")


class Guided(FluxPipeline):
    """FLUX guided by a second call a step."""

    def __call__(
        self, prompt: Any, num_inference_steps: Any, generator: Any, output_type: Any, **sides: Any
    ) -> Any:
        return super().__call__(
            prompt,
            negative_prompt="a frog",
            true_cfg_scale=3.0,
            num_inference_steps=num_inference_steps,
            generator=generator,
            output_type=output_type,
            height=32,
            width=32,
        )


def drawn(engine: Engine, *orders: Order, quality: str | None = None) -> list[list[Event]]:
    """The events of each order, all drawn at a time."""
    told: list[queue.Queue[Event]] = [queue.Queue() for _ in orders]
    for order, events in zip(orders, told, strict=True):
        assert not isinstance(engine.submit(order, quality, events.put), Failure)
    return [list(_until_the_end(events)) for events in told]


def _until_the_end(events: queue.Queue[Event]) -> Iterator[Event]:
    event: Event = Progress(0, 0)
    while isinstance(event, Progress):
        event = events.get(timeout=60)
        yield event


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux_folder(tmp_path_factory.mktemp("flux"))


def test_guidance_in_separate_calls_is_planned_too(flux: Path) -> None:
    loaded = FluxPipeline.from_pretrained(flux, dtype=torch.float32)
    engine = Engine(of_pipeline(Guided(**loaded.components), "guided"), running=2)
    orders = [Order("a red apple", 32, 32, 12, seed) for seed in (1, 2)]
    events = drawn(engine, *orders)
    for each in events:
        assert isinstance(each[-1], Picture)
        assert each[-2] == Progress(12, 12)
    counts = engine.counts()
    assert counts.steps["skipped"] >= 8
    alone = [drawn(engine, order)[0][-1] for order in orders]
    assert [each.png for each in alone] == [each[-1].png for each in events]  # type: ignore[union-attr]
    engine.close()


def test_guidance_in_one_batch_has_two_rows(tmp_path: Path) -> None:
    model = of_pipeline(load_folder(sd3_folder(tmp_path / "sd3"), CPU), "sd3")
    engine = Engine(model, running=2)
    orders = [Order("a red apple", 32, 32, steps, 1) for steps in (12, 8)]
    together = drawn(engine, *orders)
    counts = engine.counts()
    assert counts.rows == 2 * (12 + 8)
    assert counts.calls < 12 + 8
    assert counts.steps["skipped"] == 2  # of the 12; none of the 8
    assert not counts.fallbacks
    for order, events in zip(orders, together, strict=True):
        assert drawn(engine, order)[0][-1].png == events[-1].png  # type: ignore[union-attr]
    engine.close()


def test_a_batch_that_fails_is_evaluated_one_by_one(
    flux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = of_pipeline(load_folder(flux, CPU), "flux")
    engine = Engine(model, running=2)
    forward, batches = model.denoiser.forward, []

    def small(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        batches.append(len(hidden_states))
        if len(hidden_states) > 1:
            raise torch.OutOfMemoryError("too large")
        return forward(hidden_states, *args, **kwargs)

    monkeypatch.setattr(model.denoiser, "forward", small)
    orders = [Order("a red apple", 32, 32, 10, seed) for seed in (1, 2)]
    assert all(isinstance(events[-1], Picture) for events in drawn(engine, *orders))
    assert max(batches) == 2
    assert not engine.why_broken()
    engine.close()


def test_generations_leave_nothing_behind(flux: Path) -> None:
    """Drawn, stopped or failed: no object of theirs outlives them, collected garbage or not."""
    engine = Engine(of_pipeline(load_folder(flux, CPU), "flux"), running=3)
    sides, qualities = (32, 48), ("balanced", "dense", "fast")
    kinds = (Generation, Session, Stream, FluxPipeline, FlowMatchEulerDiscreteScheduler)

    def some(count: int) -> None:
        for i in range(count):
            order = Order("a red apple", sides[i % 2], 32, 4 + i % 5, i)
            drawn(engine, order, order, quality=qualities[i % 3])
        ended = engine.submit(Order("a red apple", 32, 32, 200, 0), None, lambda _: None)
        assert isinstance(ended, Generation)
        until(lambda: ended.calls > 1)
        ended.cancel()
        until(lambda: not engine.counts().running)

    def alive() -> Counter[str]:
        return Counter(kind.__name__ for kind in map(type, gc.get_objects()) if kind in kinds)

    some(2)
    gc.collect()
    gc.disable()
    try:
        before = alive()
        some(4)
        until(lambda: alive() == before)
        assert sum(each.name.startswith("specdiff-draw") for each in threading.enumerate()) <= 3
    finally:
        gc.enable()
    engine.close()


def test_closing_ends_what_is_under_way_and_leaves_the_model_as_it_was(flux: Path) -> None:
    model: PictureModel = of_pipeline(load_folder(flux, CPU), "flux")
    kind = type(model.denoiser)
    engine = Engine(model, running=1)
    told: queue.Queue[Event] = queue.Queue()
    for _ in range(2):
        engine.submit(Order("a red apple", 32, 32, 200, 0), None, told.put)
    assert isinstance(told.get(timeout=60), Progress)
    engine.close()
    assert engine.why_not_ready() == "the engine has stopped"
    assert type(model.denoiser) is kind
