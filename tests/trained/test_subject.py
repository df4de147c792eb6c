"""What is drawn by which model, and what is said where one cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specdiff.errors import SpecdiffError
from specdiff.models import demo
from specdiff.models.subject import Request, emoji, find_subject
from specdiff.models.textures import class_codes

CPU = torch.device("cpu")


@pytest.mark.parametrize("weights", [None, Path("nowhere.safetensors")])
@pytest.mark.parametrize("model", ["textures", "photos"])
def test_weights_that_do_not_ship_are_asked_for(model: str, weights: Path | None) -> None:
    with pytest.raises(SpecdiffError, match=f"--weights the path of {model}.safetensors"):
        find_subject(model, weights, CPU)


def test_photographs_are_guided_by_codes_of_their_own() -> None:
    subject = find_subject("photos", Path(__file__), CPU)  # weights are read when it is loaded
    given = subject.arguments("cat")
    assert subject.options == {"guidance_scale": given["guidance_scale"]}
    assert not torch.equal(given["prompt_embeds"], class_codes(["tissue"])[0])
    assert not given["negative_prompt_embeds"].any()
    assert {request.prompt for request in subject.requests(8, 100)} == set(subject.prompts)


def test_a_model_that_is_none_is_refused() -> None:
    with pytest.raises(
        SpecdiffError, match="no model 'faces': choose from emoji, textures, photos"
    ):
        find_subject("faces", None, CPU)


def test_a_prompt_without_a_text_encoder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    demo._text_encoder.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SpecdiffError, match=r"'no such concept': .*specdiff\[text\]"):
        emoji(CPU).embed([Request("no such concept", 0)])
