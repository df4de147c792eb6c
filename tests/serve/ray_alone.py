"""Run in a network namespace of its own, as Ray listens on all interfaces: a real local cluster.

`killed FOLDER`: two replicas, one killed in mid-picture. `front FOLDER`: Ray's own proxy answers.
Writes what clients got into a third argument, a file, as JSON: Ray's logs go everywhere else.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray import serve

from specdiff.serve.app import create_app
from specdiff.serve.deployment import Wish, application, run_on_cluster, stop_on_cluster
from tests.serve.served import ask, read, serving, until

BODY = {"prompt": "a red apple", "size": "32x32", "steps": 100, "seed": 1}
WRONG = {**BODY, "size": "33x33"}


def killed(folder: str) -> dict[str, Any]:
    backend = run_on_cluster(Wish(folder, replicas=2, running=2), "local")
    with serving(create_app(backend, deadline=120)) as port:
        ready, wrong = read(port, "/readyz")[0], ask(port, WRONG)[0]
        _, alone, _ = ask(port, BODY)
        answers: list[tuple[int, Any, Any]] = []
        clients = [
            threading.Thread(target=lambda: answers.append(ask(port, BODY))) for _ in range(4)
        ]
        for client in clients:
            client.start()
        time.sleep(1)
        os.kill(replicas()[0], signal.SIGKILL)
        for client in clients:
            client.join()
        picture = alone["data"][0]["b64_json"]
        told = {
            "ready": ready,
            "wrong": wrong,
            "statuses": [status for status, _, _ in answers],
            "same": [content["data"][0]["b64_json"] == picture for _, content, _ in answers],
            "counted": "specdiff_steps_total" in read(port, "/metrics")[1],
        }
    stop_on_cluster()
    return told


def front(folder: str) -> dict[str, Any]:
    ray.init(address="local", include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": 8000})
    serve.run(application({"target": folder, "running": "2"}), name="specdiff", blocking=False)
    until(lambda: read(8000, "/readyz")[0] == 200)
    return {"picture": ask(8000, BODY)[0], "wrong": ask(8000, WRONG)[0]}


def replicas() -> list[int]:
    """Processes by the title that Ray gives to replicas."""
    titles = {int(file.parent.name): file for file in Path("/proc").glob("[0-9]*/cmdline")}
    return [pid for pid, file in titles.items() if b"ServeReplica:specdiff:Replica" in text(file)]


def text(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # it has ended
        return b""


if __name__ == "__main__":
    told = {"killed": killed, "front": front}[sys.argv[1]](sys.argv[2])
    Path(sys.argv[3]).write_text(json.dumps(told))
    serve.shutdown()
    ray.shutdown()
