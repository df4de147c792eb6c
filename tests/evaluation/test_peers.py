"""Others' caches: that they really cache on FLUX, and why they refuse elsewhere."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from specdiff.evaluation.candidates import Candidate
from specdiff.evaluation.peers import Refused, peers
from specdiff.evaluation.subject import STEPS, Subject
from specdiff.textures import class_codes, wrap_pipeline
from tests.models import flux, sd3

FAMILIES = {
    "FirstBlockCache",
    "TaylorSeer",
    "MagCache",
    "SeaCache",
    "FasterCache",
    "PyramidAttentionBroadcast",
    "cache-dit DBCache",
    "cache-dit DBCache + TaylorSeer 1",
}


def flux_pipeline() -> Any:
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=flux(layers=1, single_layers=2)[0],
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flux_subject() -> Subject:
    generator = torch.Generator().manual_seed(0)
    arguments = {
        "prompt_embeds": torch.randn(1, 4, 24, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 20, generator=generator),
        "height": 64,
        "width": 64,
    }
    return Subject("flux", flux_pipeline, ("a",), lambda prompt: arguments, lambda latents: latents)


def loosest() -> dict[str, Candidate]:
    """The last, and so fastest, setting of each family."""
    return {one.family: one for one in peers(flux_subject())}


def test_every_family_has_three_settings_or_more() -> None:
    names = [one.family for one in peers(flux_subject())]
    assert set(names) == FAMILIES
    assert min(names.count(name) for name in FAMILIES) >= 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_peer_caches_and_starts_each_picture_afresh(family: str) -> None:
    if family.startswith("cache-dit") and importlib.util.find_spec("cache_dit") is None:
        pytest.skip("cache-dit is not installed")
    subject = flux_subject()
    request = subject.requests(1, 0)[0]
    dense = subject.draw(subject.load(), request)
    eager = loosest()[family].eager
    assert eager is not None
    pipeline = eager(subject.load())
    first, second = (subject.draw(pipeline, request, STEPS) for _ in range(2))
    assert torch.isfinite(first).all()
    assert not torch.equal(first, dense)  # a cache in "fail-open mode" would be equal
    torch.testing.assert_close(first, second)


@pytest.mark.filterwarnings("ignore")
def test_diffusers_caches_refuse_sd3_with_a_reason() -> None:
    for family, candidate in loosest().items():
        if not family.startswith("cache-dit"):
            assert candidate.eager is not None
            with pytest.raises(Refused, match="SD3Transformer2DModel has no enable_cache"):
                candidate.eager(wrap_pipeline(sd3()[0]))


def test_a_library_that_is_not_installed_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    eager = loosest()["cache-dit DBCache"].eager
    assert eager is not None
    with pytest.raises(Refused, match=r"pip install specdiff\[peers\]"):
        eager(object())


def test_class_codes_are_fixed_and_differ() -> None:
    tokens, pooled = class_codes(["brick", "grass", "brick"])
    assert tokens.shape == (3, 4, 64)
    assert torch.equal(tokens[0], tokens[2])
    assert not torch.equal(pooled[0], pooled[1])
    with pytest.raises(ValueError, match="no class 'wood'"):
        class_codes(["wood"])
