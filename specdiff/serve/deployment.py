"""Deployment: engines as replicas on a Ray cluster, and the same application in front of them.

specdiff serve --ray auto                 this process answers HTTP, replicas draw
serve run specdiff.serve.deployment:application target=/models/flux
                                          Ray's proxies answer HTTP, too
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from typing import Any

from fastapi import FastAPI

from specdiff.models.picture_model import Order
from specdiff.serve.app import create_app
from specdiff.serve.drawing import Local
from specdiff.serve.events import Card, Counts, Event, Failure, Picture, Progress
from specdiff.serve.start import Wish, engine_of

NAME = "specdiff"
"""Of the application on the cluster."""
REPLICA = "Replica"
TRIES = 3
"""Replicas that may die under one picture."""
RETRY_AFTER = 5
"""Seconds in which a replica is started anew, as a rule."""
GRACE = 5.0
"""Seconds after the deadline in which a replica may say so itself."""


class Replica:
    """An engine in a process of its own. Serve calls it ready once the first picture is drawn."""

    def __init__(self, wish: Wish) -> None:
        engine = engine_of(wish)
        self._local = Local(engine)
        engine.warm_up()
        self.check_health()

    async def events(
        self, order: Order, quality: str | None, seconds: float
    ) -> AsyncGenerator[Event, None]:
        """As of `Backend`."""
        async for event in self._local.events(order, quality, seconds):
            yield event

    async def card(self) -> Card:
        """As of `Backend`."""
        return await self._local.card()

    def check_health(self) -> None:
        """Serve replaces a replica that raises here."""
        if reason := self._local.engine.why_broken():
            raise RuntimeError(reason)


class Replicas:
    """The replicas of a cluster as a backend: one that dies is replaced by another, mid-picture."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._card: Card | None = None
        self._counts: dict[str, Counts] = {}

    async def events(
        self, order: Order, quality: str | None, seconds: float
    ) -> AsyncGenerator[Event, None]:
        """As of `Backend`."""
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import BackPressureError, RayServeException

        began = time.monotonic()
        until = began + seconds
        for _ in range(TRIES):
            drawn = self._handle.options(stream=True).events.remote(
                order, quality, until - time.monotonic()
            )
            try:
                event: Event = Progress(0, order.steps)
                while isinstance(event, Progress):
                    left = until + GRACE - time.monotonic()
                    event = await asyncio.wait_for(anext(drawn), left)
                    yield self._noted(event)
                return
            except BackPressureError:
                yield Failure("full", "every replica has a full queue", retry_after=RETRY_AFTER)
                return
            except TimeoutError:
                yield Failure("late", f"{seconds:g} s have passed")
                return
            except RayTaskError as error:
                yield Failure("broken", str(error).strip().rpartition("\n")[2])
                return
            except (RayError, RayServeException, StopAsyncIteration):
                continue  # the replica has died
            finally:
                with suppress(RayError, RayServeException):
                    drawn.cancel()
        text = f"{TRIES} replicas died while they drew this picture"
        yield Failure("lost", text, retry_after=RETRY_AFTER)

    async def card(self) -> Card:
        """As of `Backend`."""
        if self._card is None:
            self._card = await self._handle.card.remote()
        return self._card

    def counts(self) -> list[Counts]:
        """As of `Backend`; of each replica as it was when it last finished a picture."""
        return list(self._counts.values())

    async def why_not_ready(self) -> str:
        """As of `Backend`."""
        from ray import serve

        status: Any = await asyncio.to_thread(serve.status)
        for application in status.applications.values():
            replica = application.deployments.get(REPLICA)
            if replica is not None and replica.replica_states.get("RUNNING", 0):
                return ""
        return "no replica is running"

    def _noted(self, event: Event) -> Event:
        if isinstance(event, Picture):
            self._counts[event.counts.engine] = event.counts
        return event


def replica_of(wish: Wish) -> Any:
    """The deployment of engines, with its limits."""
    from ray import serve

    deployment: Any = serve.deployment(
        Replica,
        name=REPLICA,
        max_ongoing_requests=wish.running + wish.waiting,
        max_queued_requests=wish.waiting,
        autoscaling_config={
            "min_replicas": wish.replicas,
            "max_replicas": max(wish.replicas, wish.most_replicas),
            "target_ongoing_requests": wish.running,
            "upscale_delay_s": 5.0,
        },
        health_check_period_s=5.0,
        health_check_timeout_s=60.0,
        graceful_shutdown_timeout_s=30.0,
        ray_actor_options={"num_cpus": 1, "num_gpus": float(wish.device.startswith("cuda"))},
    )
    return deployment.bind(wish)


def run_on_cluster(wish: Wish, address: str) -> Replicas:
    """Start replicas on the cluster at an address, and wait for the first.

    Args:
        wish: What they are made with.
        address: `auto`, `host:port`, or `local` for a cluster of this process, whose sockets other
            machines can reach.
    """
    import ray
    from ray import serve

    ray.init(address=address, include_dashboard=False if address == "local" else None)
    serve.start(proxy_location="Disabled")
    return Replicas(serve.run(replica_of(wish), name=NAME, route_prefix=None))


def stop_on_cluster() -> None:
    """Take the replicas away again."""
    from ray import serve

    serve.delete(NAME)


def application(settings: Mapping[str, str]) -> Any:
    """The application as `serve run` and Serve's configuration files take it.

    Args:
        settings: Fields of `Wish`, and `deadline`, as text.
    """
    from ray import serve

    deadline = float(settings.get("deadline", 300.0))

    def front() -> FastAPI:
        return create_app(Replicas(serve.get_deployment_handle(REPLICA)), deadline)

    wish = Wish.of_text({name: text for name, text in settings.items() if name != "deadline"})
    deployment: Any = serve.deployment(serve.ingress(front)(), name="Front", num_replicas=1)
    return deployment.bind(replica_of(wish))
