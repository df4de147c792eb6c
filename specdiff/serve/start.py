"""Start: from what somebody wishes to an engine that can draw, in a server or a replica of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from specdiff.errors import SpecdiffError
from specdiff.measure.machine import usable_device
from specdiff.models.picture_model import load_picture_model
from specdiff.models.subject import quiet_libraries
from specdiff.serve.engine import Engine
from specdiff.serve.heap import share_heap
from specdiff.serve.programs import compile_into


@dataclass(frozen=True)
class Wish:
    """What an engine is made with, and how many replicas of it; paths are those of every machine.

    Attributes:
        max_cache_bytes: What generations in progress keep for forecasts, at most.
        programs: Folder of compiled programs, of this start and earlier ones; None: not compiled.
    """

    target: str = "demo"
    device: str = "cpu"
    quality: str = "balanced"
    running: int = 8
    waiting: int = 64
    max_cache_bytes: int | None = None
    programs: str | None = None
    replicas: int = 1
    most_replicas: int = 1

    @classmethod
    def of_text(cls, settings: Mapping[str, str]) -> Wish:
        """The fields as text.

        Raises:
            SpecdiffError: There is no such field, or no number where one belongs.
        """
        kinds = {field.name: str(field.type) for field in fields(cls)}
        if unknown := settings.keys() - kinds.keys():
            raise SpecdiffError(f"{unknown.pop()}: expected one of {', '.join(kinds)}")
        return cls(**{name: _value(name, text, kinds[name]) for name, text in settings.items()})


def _value(name: str, text: str, kind: str) -> Any:
    if not kind.startswith("int"):
        return text
    try:
        return int(text)
    except ValueError:
        raise SpecdiffError(f"{name}: expected a whole number, not {text!r}") from None


def engine_of(wish: Wish) -> Engine:
    """The engine, which has drawn nothing yet."""
    share_heap()
    quiet_libraries()
    model = load_picture_model(wish.target, usable_device(wish.device))
    if wish.programs is not None:
        compile_into(wish.programs, model.denoiser)
    return Engine(model, wish.quality, wish.running, wish.waiting, wish.max_cache_bytes)
