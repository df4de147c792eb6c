"""App: the routes. Every answer without a picture says why, in JSON.

POST /v1/images/generations    OpenAI's call
GET  /                         a page to try it
GET  /healthz  /readyz         is it alive, can it draw now
GET  /metrics                  for Prometheus
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.exceptions import HTTPException

from specdiff.errors import described
from specdiff.models.picture_model import Order
from specdiff.serve.drawing import together
from specdiff.serve.engine import CHOICES
from specdiff.serve.events import Backend, Event, Failure, Picture, Progress
from specdiff.serve.metrics import Metrics
from specdiff.serve.requests import Refusal, Wanted, refusal, wanted

logger = logging.getLogger(__name__)

CLIENT_GONE = 499
Events = AsyncGenerator[tuple[int, Event], None]


def create_app(
    backend: Backend, deadline: float = 300.0, close: Callable[[], None] | None = None
) -> FastAPI:
    """The application, in front of an engine or of replicas.

    Args:
        backend: Who draws.
        deadline: Seconds after which any request fails.
        close: Called when the server stops.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        if close is not None:
            await asyncio.to_thread(close)

    app = FastAPI(title="specdiff", lifespan=lifespan, docs_url=None, redoc_url=None)
    _answers_for_errors(app)
    _routes(app, backend)
    images = Images(backend, deadline)
    app.post("/v1/images/generations", openapi_extra=_body_schema())(images.post)
    app.get("/metrics")(images.measured)
    return app


class Images:
    """Answers requests for pictures."""

    def __init__(self, backend: Backend, deadline: float) -> None:
        self._backend = backend
        self._deadline = deadline
        self._metrics = Metrics(backend.counts)

    async def measured(self) -> Response:
        """What Prometheus reads."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def post(self, request: Request) -> Response:
        """Draw what the body asks for."""
        try:
            answer = await self._answer(request)
        except Refusal as no:
            self._metrics.answered(no.status)
            raise
        self._metrics.answered(answer.status_code)
        return answer

    async def _answer(self, request: Request) -> Response:
        body = await wanted(request)
        orders = body.orders(await self._backend.card())
        seconds = min(body.deadline or self._deadline, self._deadline)
        events = together(self._backend, orders, body.own_quality, seconds)
        first = await anext(events)  # an order that is refused is answered as such, streamed or not
        if isinstance(first[1], Failure):
            await events.aclose()
            raise refusal(first[1])
        if body.stream:
            return StreamingResponse(
                self._stream(events, orders, body), 200, media_type="text/event-stream"
            )
        return await _unless_gone(request, self._whole(events, orders, body))

    async def _whole(self, events: Events, orders: Sequence[Order], body: Wanted) -> Response:
        """All pictures in one answer."""
        pictures: dict[int, Picture] = {}
        async with aclosing(events):
            async for index, event in events:
                if isinstance(event, Failure):
                    raise refusal(event)
                if isinstance(event, Picture):
                    self._metrics.drawn(body.quality, event.seconds)
                    pictures[index] = event
        data = [_entry(pictures[i], order) for i, order in enumerate(orders)]
        return JSONResponse({"created": int(time.time()), "data": data})

    async def _stream(
        self, events: Events, orders: Sequence[Order], body: Wanted
    ) -> AsyncGenerator[str, None]:
        """Progress and pictures as they come, as server-sent events."""
        async with aclosing(events):
            async for index, event in events:
                if isinstance(event, Failure):
                    yield _sent("error", refusal(event).body)
                elif isinstance(event, Progress):
                    yield _sent("progress", {"index": index, **vars(event)})
                else:
                    self._metrics.drawn(body.quality, event.seconds)
                    yield _sent("completed", {"index": index, **_entry(event, orders[index])})


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The answer; or work is stopped, as the client has gone away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    drawing, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((drawing, leaving), return_when=asyncio.FIRST_COMPLETED)
        return drawing.result() if drawing.done() else Response(status_code=CLIENT_GONE)
    finally:
        for task in (drawing, leaving):
            task.cancel()
        await asyncio.gather(drawing, leaving, return_exceptions=True)


def _entry(picture: Picture, order: Order) -> dict[str, Any]:
    text = base64.b64encode(picture.png).decode("ascii")
    return {"b64_json": text, "seed": order.seed, "seconds": round(picture.seconds, 3)}


def _sent(kind: str, value: dict[str, Any]) -> str:
    name = f"image_generation.{kind}"
    return f"event: {name}\ndata: {json.dumps({'type': name, **value})}\n\n"


def _body_schema() -> dict[str, Any]:
    """The body's form, for /openapi.json: it is read by hand, within a limit."""
    schema = Wanted.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _routes(app: FastAPI, backend: Backend) -> None:
    templates = Environment(
        loader=PackageLoader("specdiff.serve"), autoescape=True, undefined=StrictUndefined
    )

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        card = await backend.card()
        return templates.get_template("page.html").render(card=card, qualities=CHOICES)

    @app.get("/healthz")
    async def alive() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz")
    async def ready() -> dict[str, str]:
        reason = await backend.why_not_ready()
        if reason:
            raise Refusal(503, reason, retry_after=1)
        return {"status": "ready"}


def _answers_for_errors(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refused(_: Request, no: Refusal) -> JSONResponse:
        return JSONResponse(no.body, no.status, headers=no.headers)

    @app.exception_handler(HTTPException)
    async def wrong_address(_: Request, error: HTTPException) -> JSONResponse:
        no = Refusal(error.status_code, str(error.detail))
        return JSONResponse(no.body, no.status, headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        logger.error("a request failed", exc_info=error)
        return JSONResponse(Refusal(500, described(error)).body, 500)
