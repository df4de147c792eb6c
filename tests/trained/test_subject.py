"""What is drawn by which model, and what is said where one cannot be had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from PIL import Image
from safetensors.torch import save_file

import specdiff
from specdiff.errors import SpecdiffError
from specdiff.models import demo, motion
from specdiff.models.subject import Request, emoji, find_subject
from specdiff.models.textures import class_codes

CPU = torch.device("cpu")


@pytest.mark.parametrize("weights", [None, Path("nowhere.safetensors")])
@pytest.mark.parametrize("model", ["textures", "photos", "motion"])
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


@pytest.fixture
def motion_weights(tmp_path: Path) -> Path:
    """Of a model of one block that was not trained, and first frames of noise."""
    sizes = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12}
    widths = {"text_dim": 64, "freq_dim": 32, "ffn_dim": 32, "num_layers": 1}
    config = {**sizes, **widths, "in_channels": 12, "out_channels": 12, "rope_max_seq_len": 32}
    torch.manual_seed(0)
    state = {k: v.contiguous() for k, v in WanTransformer3DModel(**config).state_dict().items()}
    weights = tmp_path / "motion.safetensors"
    save_file(state, weights, metadata={"config": json.dumps(config)})
    strip = torch.randint(256, (32, 16 * 32, 3), dtype=torch.uint8)
    Image.fromarray(strip.numpy()).save(tmp_path / motion.FIRST_FRAMES)
    return weights


def test_clips_go_on_from_their_first_frame(motion_weights: Path) -> None:
    subject = find_subject("motion", motion_weights, CPU)
    request = subject.requests(16, 100)[11]
    assert (len(set(subject.prompts)), request.prompt) == (16, "down 2")
    pipeline = subject.load()
    specdiff.attach(pipeline.transformer, quality="balanced")
    strip = subject.picture(subject.draw(pipeline, request, steps=12))
    assert strip.shape == (motion.SIDE, motion.FRAMES * motion.SIDE, 3)
    first = subject.arguments(request.prompt)["image"][0].permute(1, 2, 0)
    torch.testing.assert_close(strip[:, : motion.SIDE], first)
    stats = specdiff.stats(pipeline.transformer)
    assert stats.skipped > 0 and stats.dense + stats.skipped == 2 * 12


def test_nothing_is_lost_where_clips_are_folded() -> None:
    frames = torch.rand(2, 3, motion.FRAMES, motion.SIDE, motion.SIDE)
    folded = motion.fold(frames)
    assert folded.shape == (2, motion.CHANNELS, motion.FRAMES, 16, 16)
    assert torch.equal(motion.unfold(folded), frames)


def test_a_model_that_is_none_is_refused() -> None:
    with pytest.raises(
        SpecdiffError, match="no model 'faces': choose from emoji, textures, photos, motion"
    ):
        find_subject("faces", None, CPU)


def test_a_prompt_without_a_text_encoder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    demo._text_encoder.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SpecdiffError, match=r"'no such concept': .*specdiff\[text\]"):
        emoji(CPU).embed([Request("no such concept", 0)])
