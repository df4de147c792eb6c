"""Drawing: an engine's events in asyncio, and those of several pictures as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from specdiff.errors import described
from specdiff.models.picture_model import Order
from specdiff.serve.engine import Engine
from specdiff.serve.events import Backend, Card, Counts, Event, Failure, Progress


class Local:
    """An engine in this process as a backend."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def events(
        self, order: Order, quality: str | None, seconds: float
    ) -> AsyncGenerator[Event, None]:
        """As of `Backend`."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event] = asyncio.Queue()
        generation = self.engine.submit(order, quality, lambda event: _put(loop, queue, event))
        if isinstance(generation, Failure):
            yield generation
            return
        until = loop.time() + seconds
        try:
            event: Event = Progress(0, order.steps)
            while isinstance(event, Progress):
                yield event
                done = event
                try:
                    event = await asyncio.wait_for(queue.get(), until - loop.time())
                except TimeoutError:
                    text = f"{seconds:g} s have passed, {done.step} of {done.steps} steps are done"
                    event = Failure("late", text)
            yield event
        finally:
            generation.cancel()

    async def card(self) -> Card:
        """As of `Backend`."""
        return self.engine.card()

    def counts(self) -> list[Counts]:
        """As of `Backend`."""
        return [self.engine.counts()]

    async def why_not_ready(self) -> str:
        """As of `Backend`."""
        return self.engine.why_not_ready()


def _put(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Event], event: Event) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(queue.put_nowait, event)


async def together(
    backend: Backend, orders: Sequence[Order], quality: str | None, seconds: float
) -> AsyncGenerator[tuple[int, Event], None]:
    """The events of all orders, each with its order's index, as they come.

    Ends with all pictures or the first failure. Closing it stops all generations.
    """
    queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    async def draw(index: int, order: Order) -> None:
        try:
            async with aclosing(backend.events(order, quality, seconds)) as events:
                async for event in events:
                    await queue.put((index, event))
        except Exception as error:
            await queue.put((index, Failure("broken", described(error))))

    tasks = [asyncio.create_task(draw(i, order)) for i, order in enumerate(orders)]
    left = len(tasks)
    try:
        while left:
            index, event = await queue.get()
            yield index, event
            if isinstance(event, Failure):
                return
            left -= not isinstance(event, Progress)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
