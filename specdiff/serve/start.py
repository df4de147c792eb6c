"""Start: from what somebody wishes to an engine that can draw, in a server or a replica of one."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from specdiff.errors import SpecdiffError
from specdiff.measure.machine import usable_device
from specdiff.models.picture_model import load_picture_model
from specdiff.models.subject import quiet_libraries
from specdiff.serve.engine import Engine
from specdiff.serve.heap import share_heap

logger = logging.getLogger(__name__)

WORDS = {"true": True, "false": False}


@dataclass(frozen=True)
class Wish:
    """What an engine is made with, and how many replicas of it; paths are those of every machine.

    Attributes:
        compile: Whether the model is compiled by Inductor, for any size and batch.
        artifacts: With `compile`: a file of compiled programs. Read where it exists, else written
            once the first pictures are drawn. It is code: read your own alone.
        max_cache_bytes: What generations in progress keep for forecasts, at most.
    """

    target: str = "demo"
    device: str = "cpu"
    quality: str = "balanced"
    running: int = 8
    waiting: int = 64
    compile: bool = False
    artifacts: str | None = None
    max_cache_bytes: int | None = None
    replicas: int = 1
    most_replicas: int = 1

    @classmethod
    def of_text(cls, settings: Mapping[str, str]) -> Wish:
        """The fields as text: numbers, true and false.

        Raises:
            SpecdiffError: There is no such field, or nothing of its kind in the text.
        """
        kinds = {field.name: str(field.type) for field in fields(cls)}
        if unknown := settings.keys() - kinds.keys():
            raise SpecdiffError(f"{unknown.pop()}: expected one of {', '.join(kinds)}")
        return cls(**{name: _value(name, text, kinds[name]) for name, text in settings.items()})


def _value(name: str, text: str, kind: str) -> Any:
    try:
        if kind.startswith("int"):
            return int(text)
        return WORDS[text.lower()] if kind == "bool" else text
    except (ValueError, KeyError):
        expected = "a whole number" if kind.startswith("int") else "true or false"
        raise SpecdiffError(f"{name}: expected {expected}, not {text!r}") from None


def engine_of(wish: Wish) -> Engine:
    """The engine, which has drawn nothing yet."""
    share_heap()
    quiet_libraries()
    model = load_picture_model(wish.target, usable_device(wish.device))
    if wish.compile:
        if wish.artifacts is not None and Path(wish.artifacts).exists():
            torch.compiler.load_cache_artifacts(Path(wish.artifacts).read_bytes())
        # One program for all sizes and batches, so that no later request waits for the compiler.
        model.denoiser.compile(dynamic=True)
    return Engine(model, wish.quality, wish.running, wish.waiting, wish.max_cache_bytes)


def warm_up(engine: Engine, wish: Wish) -> None:
    """Draw the first pictures, and keep the programs that they needed."""
    engine.warm_up()
    if not wish.compile or wish.artifacts is None or engine.why_not_ready():
        return
    file = Path(wish.artifacts)
    found = None if file.exists() else torch.compiler.save_cache_artifacts()
    if found is not None:
        try:
            new = file.with_name(f"{file.name}.{os.getpid()}")
            new.write_bytes(found[0])
            new.replace(file)  # others that start meanwhile read all of it or nothing
        except OSError as error:
            logger.warning("the programs are not kept: %s", error)
