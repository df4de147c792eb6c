"""`specdiff serve` as its clients see it: uvicorn, sockets, threads, a tiny FLUX."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason='serving needs pip install -e ".[serve]"')
pytest.importorskip("uvicorn", reason='serving needs pip install -e ".[serve]"')
pytest.importorskip("prometheus_client", reason='serving needs pip install -e ".[serve]"')

from dataclasses import replace

from specdiff.models.picture_model import Order, PictureModel, load_picture_model
from specdiff.serve.app import create_app
from specdiff.serve.drawing import Local
from specdiff.serve.engine import Engine
from tests.examples.small import flux_folder
from tests.serve.served import ADDRESS, JSON, alone, ask, pixels, read, serving, until

BODY: dict[str, Any] = {"prompt": "a red apple", "size": "32x32", "steps": 10, "seed": 5}
RUNNING, WAITING = 3, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PictureModel:
    folder = flux_folder(tmp_path_factory.mktemp("flux"))
    return replace(load_picture_model(str(folder), torch.device("cpu")), name="tiny", side=32)


@pytest.fixture(scope="module")
def engine(model: PictureModel) -> Engine:
    return Engine(model, running=RUNNING, waiting=WAITING)


@pytest.fixture(scope="module")
def port(engine: Engine) -> Iterator[int]:
    with serving(create_app(Local(engine), deadline=60, close=engine.close)) as port:
        assert read(port, "/readyz")[0] == 503
        engine.warm_up()
        assert read(port, "/readyz") == (200, '{"status":"ready"}')
        yield port
    assert not engine._rounds.alive


def test_pictures_are_those_drawn_alone(port: int, model: PictureModel) -> None:
    """Sizes, steps, qualities and seeds of their own, at a time."""
    wanted = [
        (32, 10, 5, "balanced"), (32, 12, 6, "fast"), (48, 7, 7, "dense"), (32, 28, 8, "balanced"),
        (32, 10, 9, "balanced"),
    ]  # fmt: skip
    bodies = [
        {**BODY, "size": f"{side}x32", "steps": steps, "seed": seed, "quality": quality}
        for side, steps, seed, quality in wanted
    ]
    with ThreadPoolExecutor(len(bodies)) as clients:
        answers = list(clients.map(lambda body: ask(port, body), bodies))
    for (status, content, _), body, each in zip(answers, bodies, wanted, strict=True):
        assert status == 200, content
        drawn = pixels(content["data"][0])
        assert torch.equal(drawn, pixels(ask(port, body)[1]["data"][0]))
        side, steps, seed, quality = each
        expected = alone(model, Order("a red apple", side, 32, steps, seed), quality)
        # Where the times are known in advance forecasts round otherwise: by 1 level of 255.
        assert (drawn.int() - expected.int()).abs().max() <= (quality != "dense")


def test_several_pictures_have_seeds_of_their_own(port: int) -> None:
    status, content, _ = ask(port, {**BODY, "n": 2, "model": "tiny", "quality": "auto"})
    assert status == 200
    assert [entry["seed"] for entry in content["data"]] == [5, 6]
    first, second = map(pixels, content["data"])
    assert not torch.equal(first, second)


def events(port: int, body: dict[str, Any]) -> list[dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", ADDRESS, json.dumps({**body, "stream": True}), JSON)
    text = connection.getresponse().read().decode()
    connection.close()
    return [json.loads(found) for found in re.findall(r"^data: (.*)$", text, re.MULTILINE)]


def test_a_stream_tells_every_step(port: int) -> None:
    *progress, last = events(port, BODY)
    assert [event["step"] for event in progress] == list(range(1, 11))
    assert last["type"] == "image_generation.completed"
    whole = ask(port, BODY)[1]["data"][0]
    assert torch.equal(pixels(last), pixels(whole))


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"size": "33x32"}, 400, "size: sides must be multiples of 4"),
        ({"size": "32"}, 400, "size: "),
        ({"size": "4096x4096"}, 400, "from 4 to 2048"),
        ({"steps": 0}, 400, "steps: must be from 1 to 200"),
        ({"steps": float("nan")}, 400, "steps: "),
        ({"steps": 2.5}, 400, "steps: "),
        ({"steps": "8"}, 400, "steps: "),
        ({"deadline": float("inf")}, 400, "deadline: "),
        ({"seed": -1}, 400, "seed: "),
        ({"n": 9}, 400, "n: "),
        ({"prompt": ""}, 400, "prompt: "),
        ({"prompt": " "}, 400, "prompt: is empty"),
        ({"prompt": 3}, 400, "prompt: "),
        ({"quality": "hd"}, 400, "quality: must be one of dense, closest"),
        ({"response_format": "url"}, 400, "response_format: "),
        ({"style": "vivid"}, 400, "style: "),
        ({"model": "another"}, 404, "model: tiny is served here"),
        ({"prompt": "a" * 70_000}, 413, "longer than"),
        ({"steps": 200, "deadline": 0.05}, 504, "of 200 steps are done"),
    ],
)
def test_what_cannot_be_drawn_is_answered_with_the_reason(
    port: int, body: dict[str, Any], status: int, reason: str
) -> None:
    answered, content, _ = ask(port, {**BODY, **body})
    assert answered == status, content
    assert reason in content["error"]["message"]
    if status == 400:
        assert content["error"]["param"] in body


@pytest.mark.parametrize("body", ["", "{", "[]", "nothing", b"\xff\xfe", "{}"])
def test_what_is_no_request_is_answered_with_the_reason(port: int, body: str | bytes) -> None:
    status, content, _ = ask(port, body)
    assert status == 400
    assert content["error"]["message"]


def test_other_addresses_methods_and_forms_are_refused(port: int) -> None:
    assert ask(port, BODY, {"Content-Type": "text/plain"})[0] == 415
    assert read(port, ADDRESS)[0] == 405
    status, text = read(port, "/nothing")
    assert status == 404
    assert "error" in json.loads(text)


def leave(port: int, body: dict[str, Any], engine: Engine) -> None:
    """Ask, and go away once it is being drawn."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", ADDRESS, json.dumps(body), JSON)
    until(lambda: engine.counts().running)
    connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_its_generation(
    port: int, engine: Engine, stream: bool
) -> None:
    before = sum(engine.counts().steps.values())
    leave(port, {**BODY, "steps": 200, "stream": stream}, engine)
    until(lambda: not engine.counts().running)
    assert sum(engine.counts().steps.values()) - before < 150
    assert ask(port, BODY)[0] == 200


def test_a_full_engine_says_when_to_come_back(port: int, engine: Engine) -> None:
    slow = {**BODY, "steps": 60}
    with ThreadPoolExecutor(12) as clients:
        answers = list(clients.map(lambda _: ask(port, slow), range(12)))
    statuses = [status for status, _, _ in answers]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= RUNNING + WAITING
    full = next(headers for status, _, headers in answers if status == 503)
    assert 1 <= int(full["retry-after"]) <= 60
    until(lambda: not engine.counts().running)


def test_metrics_count_steps_and_answers(port: int) -> None:
    ask(port, BODY)
    ask(port, {**BODY, "steps": 0})
    status, text = read(port, "/metrics")
    assert status == 200
    values = dict(re.findall(r"^(specdiff_\S+) (\S+)$", text, re.MULTILINE))
    assert float(values['specdiff_steps_total{kind="skipped"}']) > 0
    assert float(values['specdiff_requests_total{status="400"}']) > 0
    assert float(values['specdiff_picture_seconds_count{quality="auto"}']) > 0
    assert float(values["specdiff_running"]) == float(values["specdiff_waiting"]) == 0


def test_the_page_loads_nothing_from_elsewhere(port: int) -> None:
    status, text = read(port, "/")
    assert status == 200
    assert "<title>tiny</title>" in text
    assert not re.search(r"(src|href)=\"(https?:)?//", text)


def test_a_model_that_fails_is_an_answer_too(
    port: int, engine: Engine, model: PictureModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of order")

    with monkeypatch.context() as broken:
        broken.setattr(model.denoiser, "forward", fails)
        for _ in range(3):
            status, content, _ = ask(port, {**BODY, "size": "40x40", "quality": "dense"})
            assert (status, content["error"]["message"]) == (500, "RuntimeError: out of order")
        assert read(port, "/readyz")[0] == 503
    assert ask(port, BODY)[0] == 200
    assert read(port, "/readyz")[0] == 200


def test_a_picture_that_is_not_finite_is_not_sent(port: int, model: PictureModel) -> None:
    weight = next(model.denoiser.parameters())
    kept = weight.detach().clone()
    try:
        weight.data.fill_(float("nan"))
        status, content, _ = ask(port, BODY)
    finally:
        weight.data.copy_(kept)
    assert status == 500
    assert "not finite" in content["error"]["message"]
