"""`specdiff serve`: pictures over HTTP."""

from __future__ import annotations

import threading
from typing import Annotated

import typer

from specdiff.cli.common import console
from specdiff.errors import SpecdiffError

LOOPBACK = "127.0.0.1"


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
) -> None:
    """Draw pictures for HTTP clients, and on a page to try it, until interrupted.

    Listens on this machine alone unless --host says otherwise.
    """
    try:
        import uvicorn

        from specdiff.serve.app import create_app
    except ModuleNotFoundError as missing:
        raise SpecdiffError(
            f'{missing.name} is missing: specdiff serve needs pip install -e ".[serve]"'
        ) from None
    from specdiff.measure.machine import usable_device
    from specdiff.models.picture_model import load_picture_model
    from specdiff.models.subject import quiet_libraries
    from specdiff.serve.drawing import Local
    from specdiff.serve.engine import CHOICES, Engine

    if quality not in CHOICES:
        raise SpecdiffError(f"--quality: must be one of {', '.join(CHOICES)}")
    quiet_libraries()
    model = load_picture_model(target, usable_device(device))
    engine = Engine(model, quality, running, waiting)
    threading.Thread(target=engine.warm_up, daemon=True).start()
    app = create_app(Local(engine), deadline, engine.close)
    console.print(f"{model.name}: http://{host}:{port}", highlight=False)
    uvicorn.run(app, host=host, port=port, log_level="warning")
