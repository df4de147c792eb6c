"""A real application on a real uvicorn on loopback, and a client of it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import specdiff
from specdiff.models.picture_model import Order, PictureModel

ADDRESS = "/v1/images/generations"
JSON = {"Content-Type": "application/json"}


@contextmanager
def serving(app: Any) -> Iterator[int]:
    """The port of a server that runs while the context does."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def until(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.01)


def ask(port: int, body: Any, headers: dict[str, str] = JSON) -> tuple[int, Any, dict[str, str]]:
    """Status, JSON and headers of the answer to a request for pictures."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    text = body if isinstance(body, str | bytes) else json.dumps(body)
    connection.request("POST", ADDRESS, text, headers)
    answer = connection.getresponse()
    content = json.loads(answer.read())
    connection.close()
    return answer.status, content, dict(answer.getheaders())


def read(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def pixels(entry: dict[str, Any]) -> Tensor:
    """The levels of a picture that was sent, [H, W, 3]."""
    with Image.open(io.BytesIO(base64.b64decode(entry["b64_json"]))) as image:
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(
            image.height, image.width, 3
        )


def alone(model: PictureModel, order: Order, quality: str = "balanced") -> Tensor:
    """What the model draws with nobody else about, [H, W, 3]."""
    pipeline = model.beside(model.denoiser)
    with specdiff.session(model.denoiser, scheduler=pipeline.scheduler, quality=quality):
        picture = model.draw(order, pipeline)
    return (picture.clamp(0, 1) * 255).round().byte()
