"""`specdiff serve`: pictures over HTTP."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from specdiff.cli.common import console
from specdiff.errors import SpecdiffError

if TYPE_CHECKING:
    from specdiff.serve.events import Backend
    from specdiff.serve.start import Wish

LOOPBACK = "127.0.0.1"
PATIENCE = 10
"""Seconds that requests in progress get when the server stops."""


def serve(
    target: Annotated[
        str,
        typer.Argument(
            help="What draws: demo; a folder with a diffusers pipeline, in safetensors; or"
            " file.py:function, which returns a pipeline."
        ),
    ] = "demo",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0: to everybody.")] = LOOPBACK,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1.")] = "cpu",
    quality: Annotated[str, typer.Option(help="Of requests that name none.")] = "balanced",
    running: Annotated[int, typer.Option(min=1, help="Pictures in progress, at most.")] = 8,
    waiting: Annotated[int, typer.Option(min=0, help="Pictures in the queue, at most.")] = 64,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds until a request fails.")] = 300,
    max_cache_bytes: Annotated[
        int | None,
        typer.Option(min=0, help="What pictures in progress keep for forecasts, at most."),
    ] = None,
    compile: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Compile the model. Its programs stay in this folder, from which the next start is"
            " much faster. They are code: let nobody else write there.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Draw on a Ray cluster: auto or host:port. local starts one, whose sockets other"
            " machines can reach."
        ),
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="With --ray: at most.")] = 4,
) -> None:
    """Draw pictures for HTTP clients, and on a page to try it, until interrupted.

    Listens on this machine alone unless --host says otherwise.
    """
    _require_extra(["fastapi", "uvicorn", "prometheus_client", *(["ray"] if ray else [])])
    import uvicorn

    from specdiff.serve.app import create_app
    from specdiff.serve.engine import CHOICES
    from specdiff.serve.start import Wish

    if quality not in CHOICES:
        raise SpecdiffError(f"--quality: must be one of {', '.join(CHOICES)}")
    wish = Wish(
        target, device, quality, running, waiting, max_cache_bytes, compile, most_replicas=replicas
    )
    if ray is None:
        backend, close = _here(wish)
    else:
        from specdiff.serve.deployment import run_on_cluster, stop_on_cluster

        backend, close = run_on_cluster(wish, ray), stop_on_cluster
    console.print(f"{target}: http://{host}:{port}", highlight=False)
    uvicorn.run(
        create_app(backend, deadline, close),
        host=host,
        port=port,
        log_level="warning",
        timeout_graceful_shutdown=PATIENCE,
    )


def _require_extra(modules: Sequence[str]) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise SpecdiffError(
                f'{module} is missing: specdiff serve needs pip install -e ".[serve]"'
            )


def _here(wish: Wish) -> tuple[Backend, Callable[[], None]]:
    """An engine in this process, which draws its first pictures in the background."""
    from specdiff.serve.drawing import Local
    from specdiff.serve.start import engine_of

    engine = engine_of(wish)
    threading.Thread(target=engine.warm_up, daemon=True).start()
    return Local(engine), engine.close
