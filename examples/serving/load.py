"""A server under load, on this machine alone: `python examples/serving/load.py`.

Starts `specdiff serve` on the demo model as it would run, with a server for each setting:

1. saturation: more clients than pictures in progress. Dense and "balanced" take turns, on a server
   that advances 8 pictures together and on one that draws them one by one.
2. arrivals: requests come at random, at shares of what dense was measured to do at saturation.
3. faults: clients that go away and requests that are malformed, among good ones, whose pictures
   must be those that are drawn alone, but for rounding in a batch.
4. budget: memory for forecasts is short; against dense pictures.
5. replicas: one on a Ray cluster is killed while it draws, in a network namespace of its own, as
   Ray listens on all interfaces.
6. start: seconds until a server that compiles into an empty folder is ready, until the next one is
   from the same folder, and how far their pictures are from those of one that does not compile.
7. memory: 1,000 generations of many sizes, lengths and qualities, by a tiny FLUX with random
   weights.

Writes load.json and load.md beside itself.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image, ImageChops

FIGURES = Path(__file__).with_name("load.json")
PROMPTS = ("red apple", "frog", "grinning face", "hamburger", "panda", "cactus", "taxi", "robot")
HEADERS = {"Content-Type": "application/json"}
ADDRESS = "/v1/images/generations"
TOGETHER, CLIENTS = 8, 16
SHARES = (0.5, 0.9)
MALFORMED = (
    b"", b"{", b"[]", b'{"prompt": 3}', b'{"prompt": "frog", "size": "1x1"}',
    b'{"prompt": "frog", "steps": NaN}', b'{"prompt": "frog", "steps": 0}',
    b'{"prompt": "frog", "quality": "best"}', b'{"prompt": "frog", "colour": "red"}', b"\xff" * 99,
)  # fmt: skip
NAMESPACE = ("unshare", "--net", "--map-root-user", "--")
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Server:
    """A running `specdiff serve`."""

    port: int
    pid: int

    def ask(self, body: Mapping[str, Any] | bytes) -> tuple[int, Any, float]:
        """Status, content and seconds of a request."""
        began = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1200)
        content = body if isinstance(body, bytes) else json.dumps(body)
        connection.request("POST", ADDRESS, content, HEADERS)
        answer = connection.getresponse()
        found = json.loads(answer.read())
        connection.close()
        return answer.status, found, time.monotonic() - began

    def leave(self, body: Mapping[str, Any], after: float) -> None:
        """Ask, and go away."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", ADDRESS, json.dumps(body), HEADERS)
        time.sleep(after)
        connection.close()

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        return sum(float(v) for v in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))

    def cpu_seconds(self) -> float:
        """Processor time of the server so far, and of the compilers that it ran."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / TICKS

    def resident_mib(self) -> float:
        """Memory that the server holds."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def running(
    together: int, port: int, target: str = "demo", more: Sequence[str] = ()
) -> Iterator[Server]:
    """A server that advances so many pictures together, with more options."""
    command = "from specdiff.cli.main import main; main()"
    options = ["--port", str(port), "--running", str(together), "--waiting", "512"]
    options += ["--deadline", "3600", *more]
    process = subprocess.Popen(
        [sys.executable, "-c", command, "serve", target, *options], stdout=subprocess.DEVNULL
    )
    server = Server(port, process.pid)
    try:
        while not is_ready(port):
            if process.poll() is not None:
                raise SystemExit("the server did not start")
            time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        process.wait()


def is_ready(port: int) -> bool:
    """Whether the server draws."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def bodies(count: int, quality: str, side: int, steps: int) -> list[dict[str, Any]]:
    """Requests for pictures of a side in pixels; the prompts in turn, seeds counted up."""
    return [
        {"prompt": PROMPTS[i % len(PROMPTS)], "seed": i, "quality": quality, "steps": steps,
         "size": f"{side}x{side}"}
        for i in range(count)
    ]  # fmt: skip


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Of latencies, in seconds."""
    ordered = sorted(seconds)
    return {f"p{p}": round(ordered[min(len(ordered) * p // 100, len(ordered) - 1)], 2)
            for p in (50, 90, 99)}  # fmt: skip


def saturate(server: Server, wanted: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Pictures a second, and processor seconds a picture, with a queue that is never empty."""
    began, spent = time.monotonic(), server.cpu_seconds()
    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(server.ask, wanted))
    assert all(status == 200 for status, _, _ in answers), answers
    return {
        "pictures_per_second": round(len(wanted) / (time.monotonic() - began), 4),
        "cpu_seconds_per_picture": round((server.cpu_seconds() - spent) / len(wanted), 3),
        **percentiles([seconds for _, _, seconds in answers]),
    }


def arrive(server: Server, wanted: Sequence[Mapping[str, Any]], rate: float) -> dict[str, Any]:
    """Latencies where so many requests a second come at random."""
    chance, answers, threads = random.Random(0), [], []
    began = time.monotonic()
    for body in wanted:
        threads.append(threading.Thread(target=lambda b=body: answers.append(server.ask(b))))
        threads[-1].start()
        time.sleep(chance.expovariate(rate))
    for thread in threads:
        thread.join()
    assert all(status == 200 for status, _, _ in answers)
    return {
        "rate": round(rate, 4),
        "pictures_per_second": round(len(wanted) / (time.monotonic() - began), 4),
        **percentiles([seconds for _, _, seconds in answers]),
    }


def faults(server: Server, wanted: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Good requests among malformed ones and clients that leave."""
    alone = [server.ask(body)[1]["data"][0]["b64_json"] for body in wanted]
    with ThreadPoolExecutor(CLIENTS) as clients:
        leaving = [clients.submit(server.leave, {**body, "steps": 200}, 0.5) for body in wanted[:6]]
        good = [clients.submit(server.ask, body) for body in wanted]
        bad = [clients.submit(server.ask, MALFORMED[i % len(MALFORMED)]) for i in range(200)]
        pictures = [each.result() for each in good]
        refused = [each.result() for each in bad]
        for each in leaving:
            each.result()
    wait_until_idle(server)
    sent = [content["data"][0]["b64_json"] for _, content, _ in pictures]
    return {
        "good": len(good),
        "answered": sum(status == 200 for status, _, _ in pictures),
        "equal_to_alone": sum(a == b for a, b in zip(sent, alone, strict=True)),
        "most_levels_apart": max(map(levels_apart, sent, alone)),
        "malformed": len(bad),
        "refused_with_reason": sum(s == 400 and bool(c["error"]["message"]) for s, c, _ in refused),
        "left": len(leaving),
        "still_running": server.metric("specdiff_running") + server.metric("specdiff_waiting"),
    }


def short_of_memory(server: Server, wanted: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Good requests where what all of them keep for forecasts is more than may be kept."""
    dense = [server.ask({**body, "quality": "dense"}) for body in wanted]
    with ThreadPoolExecutor(CLIENTS) as clients:
        pictures = list(clients.map(server.ask, wanted))
    assert all(status == 200 for status, _, _ in (*dense, *pictures))
    sent = [content["data"][0]["b64_json"] for _, content, _ in pictures]
    exact = [content["data"][0]["b64_json"] for _, content, _ in dense]
    return {
        "answered": len(sent),
        "gave_way": server.metric("specdiff_fallbacks_total"),
        "least_psnr": round(min(map(psnr, sent, exact)), 1),
    }


def psnr(one: str, other: str) -> float:
    """Of two pictures, in dB."""
    difference = differences(one, other)
    squares = sum(c * (i % 256) ** 2 for i, c in enumerate(difference.histogram()))
    count = 3 * difference.width * difference.height
    return 10 * math.log10(255**2 * count / squares) if squares else math.inf


def levels_apart(one: str, other: str) -> int:
    """The largest difference of two pictures, in levels of 255."""
    return max(high for _, high in differences(one, other).getextrema())


def differences(one: str, other: str) -> Image.Image:
    """Of two pictures, by pixel and channel."""
    files = [io.BytesIO(base64.b64decode(text)) for text in (one, other)]
    return ImageChops.difference(*(Image.open(file).convert("RGB") for file in files))


def replica_killed(server: Server, wanted: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Good requests, whose only replica is killed once it draws them."""
    alone = [server.ask(body)[1]["data"][0]["b64_json"] for body in wanted]
    with ThreadPoolExecutor(CLIENTS) as clients:
        asked = [clients.submit(server.ask, body) for body in wanted]
        time.sleep(1)
        killed = replicas()
        under_way = sum(not each.done() for each in asked)
        os.kill(killed[0], signal.SIGKILL)
        answers = [each.result() for each in asked]
    sent = [c["data"][0]["b64_json"] if s == 200 else "" for s, c, _ in answers]
    return {
        "replicas": len(killed),
        "good": len(sent),
        "under_way": under_way,
        "answered": sum(status == 200 for status, _, _ in answers),
        "refused_503": sum(status == 503 for status, _, _ in answers),
        "most_levels_apart": max(levels_apart(a, b) for a, b in zip(sent, alone, strict=True) if a),
        "slowest": round(max(seconds for _, _, seconds in answers), 1),
    }


def replicas() -> list[int]:
    """Processes by the title that Ray gives to replicas."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            if b"ServeReplica:specdiff:Replica" in file.read_bytes():
                found.append(int(file.parent.name))
    return found


def wait_until_idle(server: Server) -> None:
    """Wait until nothing is drawn or waits."""
    while server.metric("specdiff_running") + server.metric("specdiff_waiting"):
        time.sleep(0.1)


def memory(server: Server, count: int) -> list[dict[str, float]]:
    """What the server holds after so many mixed generations."""
    chance, found = random.Random(0), []
    marks = sorted({50, count // 4, count // 2, count})
    qualities = ("dense", "closest", "near-lossless", "balanced", "fast")
    done = 0
    for mark in marks:
        mixed = [
            {
                "prompt": chance.choice(PROMPTS),
                "seed": i,
                "quality": chance.choice(qualities),
                "steps": chance.randint(4, 10),
                "size": chance.choice(("32x32", "32x32", "48x48")),
            }
            for i in range(done, mark)
        ]
        with ThreadPoolExecutor(CLIENTS) as clients:
            assert all(status == 200 for status, _, _ in clients.map(server.ask, mixed))
        done = mark
        wait_until_idle(server)
        time.sleep(1)  # for what it gives back then
        found.append({"generations": mark, "resident_mib": round(server.resident_mib(), 1)})
        print(found[-1], flush=True)
    return found


def measure_saturation(wanted: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Each setting once a round: A B A B."""
    found: dict[str, list[dict[str, Any]]] = {}
    with running(TOGETHER, wanted.port) as batched, running(1, wanted.port + 1) as single:
        for _ in range(wanted.rounds):
            for server, how in ((batched, "together"), (single, "one by one")):
                for quality in ("dense", "balanced"):
                    jobs = bodies(wanted.pictures, quality, wanted.side, wanted.steps)
                    name = f"{quality}, {how}"
                    found.setdefault(name, []).append(saturate(server, jobs))
                    print(name, found[name][-1], flush=True)
    return found


def measure_arrivals(wanted: argparse.Namespace, dense: Sequence[Mapping[str, Any]]) -> Any:
    """Latencies at shares of what dense was measured to do at saturation."""
    capacity, found = fmean(run["pictures_per_second"] for run in dense), {}
    with running(TOGETHER, wanted.port) as server:
        for share in SHARES:
            for quality in ("dense", "balanced"):
                jobs = bodies(wanted.requests, quality, wanted.side, wanted.steps)
                name = f"{quality}, {share:g} of dense's capacity"
                found[name] = arrive(server, jobs, share * capacity)
                print(name, found[name], flush=True)
    return found


def measure_budget(wanted: argparse.Namespace) -> dict[str, Any]:
    """With less memory than all that are in progress need."""
    limit = ["--max-cache-bytes", str(wanted.budget)]
    with running(TOGETHER, wanted.port, more=limit) as server:
        found = short_of_memory(server, bodies(24, "balanced", 32, 28))
    return {"bytes": wanted.budget, **found}


def measure_replicas(wanted: argparse.Namespace) -> dict[str, Any]:
    """In a namespace, by another process of this script."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.json"
        call = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh", sys.executable, __file__]
        subprocess.run(
            [*NAMESPACE, *call, "--port", str(wanted.port), "--inside", str(told)],
            env={**os.environ, "HOME": folder, "RAY_USAGE_STATS_ENABLED": "0"},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        return json.loads(told.read_text())


def measure_start(wanted: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Servers that do not compile, compile, and find programs."""
    found: dict[str, dict[str, float]] = {}
    exact: list[str] = []
    jobs = bodies(8, "balanced", 48, 28)
    with tempfile.TemporaryDirectory() as folder:
        compiled = ["--compile", folder]
        for name, more in (("eager", []), ("first", compiled), ("again", compiled)):
            began = time.monotonic()
            with running(TOGETHER, wanted.port, more=more) as server:
                ready, cpu = time.monotonic() - began, server.cpu_seconds()
                with ThreadPoolExecutor(CLIENTS) as clients:
                    answers = list(clients.map(server.ask, jobs))
            assert all(status == 200 for status, _, _ in answers)
            sent = [content["data"][0]["b64_json"] for _, content, _ in answers]
            exact = exact or sent
            found[name] = {
                "ready": round(ready, 1),
                "cpu_seconds": round(cpu, 1),
                "slowest": round(max(seconds for _, _, seconds in answers), 1),
                "most_levels_apart": max(map(levels_apart, sent, exact)),
            }
            print(name, found[name], flush=True)
    return found


def inside(port: int, told: Path) -> None:
    """The part of `measure_replicas` in the namespace."""
    cluster = ["--ray", "local", "--replicas", "1"]
    with running(TOGETHER, port, more=cluster) as server:
        found = replica_killed(server, bodies(8, "balanced", 32, 100))
    told.write_text(json.dumps(found))


def saturation_table(part: Mapping[str, Any]) -> Iterator[str]:
    """As Markdown."""
    yield "| at saturation | pictures a second | CPU seconds a picture | median latency, s |"
    yield "|---|---|---|---|"
    for name, runs in part["found"].items():
        keys = ("pictures_per_second", "cpu_seconds_per_picture", "p50")
        cells = (" / ".join(f"{run[key]:g}" for run in runs) for key in keys)
        yield f"| {name} | {' | '.join(cells)} |"


def arrivals_table(part: Mapping[str, Any]) -> Iterator[str]:
    """As Markdown."""
    yield "| arrivals | requests a second | p50, s | p90, s | p99, s |"
    yield "|---|---|---|---|---|"
    for name, run in part["found"].items():
        yield f"| {name} | {' | '.join(f'{run[key]:g}' for key in ('rate', 'p50', 'p90', 'p99'))} |"


def faults_text(part: Mapping[str, Any]) -> Iterator[str]:
    """As a paragraph."""
    f = part["found"]
    yield f"Faults: of {f['good']} good requests {f['answered']} were answered,"
    yield f"{f['equal_to_alone']} with the bytes drawn alone, and none further off than"
    yield f"{f['most_levels_apart']} of 255; of {f['malformed']} malformed ones among them"
    yield f"{f['refused_with_reason']} were refused with a reason; {f['left']} clients left, and"
    yield f"{f['still_running']:g} generations were left of them."


def budget_text(part: Mapping[str, Any]) -> Iterator[str]:
    """As a paragraph."""
    f = part["found"]
    yield f"Budget: with {f['bytes']} bytes for all that generations keep, {f['answered']} of 24"
    yield f"were answered; {f['gave_way']:g} steps ran dense as the oldest had given way, and no"
    yield f"picture was further from dense than {f['least_psnr']:g} dB."


def replicas_text(part: Mapping[str, Any]) -> Iterator[str]:
    """As a paragraph."""
    f = part["found"]
    yield f"Replicas: the only one was killed while {f['under_way']} of {f['good']} pictures were"
    yield f"drawn. {f['answered']} came, none further off than {f['most_levels_apart']} of 255 from"
    yield f"those drawn alone, and {f['refused_503']} were answered with 503; the slowest took"
    yield f"{f['slowest']:g} s, the start of another replica included."


def start_table(part: Mapping[str, Any]) -> Iterator[str]:
    """As Markdown."""
    heads = ("start", "ready after, s", "CPU seconds until then", "then 8 pictures in, s")
    yield f"| {' | '.join(heads)} | levels of 255 from eager |"
    yield "|---|---|---|---|---|"
    names = {"eager": "not compiled", "first": "`--compile`", "again": "`--compile`, once more"}
    for name, run in part["found"].items():
        keys = ("ready", "cpu_seconds", "slowest", "most_levels_apart")
        yield f"| {names[name]} | {' | '.join(f'{run[key]:g}' for key in keys)} |"


def memory_text(part: Mapping[str, Any]) -> Iterator[str]:
    """As a paragraph."""
    held = (f"{m['resident_mib']:.0f} MiB after {m['generations']}" for m in part["found"])
    yield "Memory: " + ", ".join(held) + " mixed generations."


PARTS = {
    "saturation": saturation_table,
    "arrivals": arrivals_table,
    "faults": faults_text,
    "budget": budget_text,
    "replicas": replicas_text,
    "start": start_table,
    "memory": memory_text,
}


def measure(part: str, wanted: argparse.Namespace, known: Mapping[str, Any]) -> Any:
    """The figures of one part."""
    if part == "saturation":
        return measure_saturation(wanted)
    if part == "arrivals":
        return measure_arrivals(wanted, known["saturation"]["found"]["dense, together"])
    if part == "faults":
        with running(TOGETHER, wanted.port) as server:
            return faults(server, bodies(24, "balanced", 32, 12))
    if part == "budget":
        return measure_budget(wanted)
    if part == "replicas":
        return measure_replicas(wanted)
    if part == "start":
        return measure_start(wanted)
    sys.path.insert(0, str(FIGURES.parents[2]))
    from tests.examples.small import flux_folder

    with tempfile.TemporaryDirectory() as folder:
        tiny = flux_folder(Path(folder))
        with running(TOGETHER, wanted.port, str(tiny)) as server:
            return memory(server, wanted.generations)


def main() -> None:
    """Measure each part, and write down all that is known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"which of {', '.join(PARTS)}; none: all")
    for name, usual in (
        ("port", 8765), ("pictures", 16), ("requests", 40), ("rounds", 2), ("side", 64),
        ("steps", 28), ("generations", 1000), ("budget", 400_000),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.inside is not None:
        inside(wanted.port, wanted.inside)
        return
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for part in wanted.parts or PARTS:
        load = os.getloadavg()[0]
        figures = measure(part, wanted, known)
        command = ["OMP_NUM_THREADS=" + os.environ.get("OMP_NUM_THREADS", "2"), "python"]
        command += ["examples/serving/load.py", part, *filter(is_option, sys.argv[1:])]
        known[part] = {
            "command": " ".join(command),
            "machine": f"{time.strftime('%d %B %Y')}, {os.cpu_count()} cores; load {load:.1f}"
            f" before it and {os.getloadavg()[0]:.1f} after it, mostly of others",
            "found": figures,
        }
        FIGURES.write_text(json.dumps(known, indent=2) + "\n")
        FIGURES.with_suffix(".md").write_text(page(known))


def is_option(word: str) -> bool:
    """Whether a word of the command line is no part."""
    return word not in PARTS


def page(known: Mapping[str, Any]) -> str:
    """All figures as Markdown."""
    lines = ["# `specdiff serve` under load", "", "Made by [load.py](load.py), which says how.", ""]
    for part, written in PARTS.items():
        if part in known:
            lines += [*written(known[part]), ""]
            lines += [f"`{known[part]['command']}`, {known[part]['machine']}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
