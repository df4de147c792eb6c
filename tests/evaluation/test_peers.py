"""Others' caches: that they really cache on FLUX, and why they refuse elsewhere."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from specdiff.evaluation.method import Candidate
from specdiff.evaluation.peers import Refused, peers
from specdiff.models.subject import STEPS
from specdiff.models.textures import class_codes, wrap_pipeline
from tests.evaluation.toy import flux_subject
from tests.models import sd3

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
