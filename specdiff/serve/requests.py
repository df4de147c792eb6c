"""Requests: what a client may ask for, and the answer where it asks for something else."""

from __future__ import annotations

import random
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from specdiff.models.picture_model import Order
from specdiff.serve.events import Card, Failure

MOST_BYTES = 64 * 1024
"""Of a request's body."""
MOST_PICTURES = 8
MOST_SEED = 2**63 - 1
STATUS = {"refused": 400, "full": 503, "late": 504, "lost": 503, "broken": 500}
"""The HTTP status of a failure, by its reason."""


class Refusal(Exception):
    """A request without pictures: a status of HTTP, and the reason."""

    def __init__(
        self, status: int, message: str, field: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.field = field
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    @property
    def body(self) -> dict[str, Any]:
        """The answer, in the form of OpenAI's."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": None}}


class Wanted(BaseModel):
    """The body of `POST /v1/images/generations`: OpenAI's fields, and ours below them."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str = Field(min_length=1, max_length=4000)
    model: str | None = None
    n: int = Field(default=1, ge=1, le=MOST_PICTURES)
    size: str = Field(default="auto", pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$")
    quality: str = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    stream: bool = False
    user: str | None = None
    seed: int | None = Field(default=None, ge=0, le=MOST_SEED)
    steps: int | None = None
    deadline: float | None = Field(default=None, gt=0)
    """Seconds after which the answer is of no use."""

    def orders(self, card: Card) -> list[Order]:
        """The pictures; seeds are counted up.

        Raises:
            Refusal: Another model is asked for.
        """
        if self.model not in (None, card.name):
            raise Refusal(404, f"model: {card.name} is served here", "model")
        sides = (card.side, card.side)
        if self.size != "auto":
            width, height = map(int, self.size.split("x"))
            sides = (width, height)
        seed = random.getrandbits(31) if self.seed is None else self.seed
        steps = card.steps if self.steps is None else self.steps
        seeds = ((seed + i) % (MOST_SEED + 1) for i in range(self.n))
        return [Order(self.prompt, *sides, steps, each) for each in seeds]

    @property
    def own_quality(self) -> str | None:
        """The quality; None is the server's."""
        return None if self.quality == "auto" else self.quality


async def wanted(request: Request) -> Wanted:
    """What the body of a request asks for.

    Raises:
        Refusal: It is too long, no JSON, or asks for what does not exist.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a form of another site would be something else
        raise Refusal(415, "the Content-Type must be application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            raise Refusal(413, f"the body is longer than {MOST_BYTES} bytes")
    try:
        return Wanted.model_validate_json(bytes(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or None
        raise Refusal(400, f"{field or 'body'}: {first['msg']}", field) from None


def refusal(failure: Failure) -> Refusal:
    """A generation's failure as an answer."""
    status = STATUS[failure.reason]
    wait = failure.retry_after or (1 if status == 503 else None)
    return Refusal(status, failure.message, failure.field, wait)
