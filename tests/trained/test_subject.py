"""What is drawn by which model, and what is said where one cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specdiff.errors import SpecdiffError
from specdiff.models import demo
from specdiff.models.subject import Request, emoji, find_subject

CPU = torch.device("cpu")


@pytest.mark.parametrize("weights", [None, Path("nowhere.safetensors")])
def test_weights_that_do_not_ship_are_asked_for(weights: Path | None) -> None:
    with pytest.raises(SpecdiffError, match=r"do not ship with the package: pass --weights"):
        find_subject("textures", weights, CPU)


def test_a_model_that_is_none_is_refused() -> None:
    with pytest.raises(SpecdiffError, match="no model 'faces': choose from emoji, textures"):
        find_subject("faces", None, CPU)


def test_a_prompt_without_a_text_encoder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    demo._text_encoder.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SpecdiffError, match=r"'no such concept': .*specdiff\[text\]"):
        emoji(CPU).embed([Request("no such concept", 0)])
