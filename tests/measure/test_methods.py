"""The methods that the demo compares."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch

from specdiff.cli.common import parse_options
from specdiff.measure.comparison import psnr
from specdiff.measure.methods import (
    DemoRun,
    compiled_pipeline,
    demo_methods,
    demo_requests,
    picture_maker,
)
from specdiff.models.subject import emoji


def test_settings_of_inductor_are_options_of_every_method(monkeypatch: pytest.MonkeyPatch) -> None:
    options = parse_options(["epilogue_fusion=False", "cache_ratio=0.5"])
    seen: list[Mapping[str, object]] = []

    def compiled(setting: DemoRun, backend: str, options: Mapping[str, object]) -> SimpleNamespace:
        seen.append(options)
        return SimpleNamespace(transformer=None)

    monkeypatch.setattr("specdiff.measure.methods.compiled_pipeline", compiled)
    demo_methods(DemoRun(emoji(torch.device("cpu")), 4, options))
    assert seen == [{"epilogue_fusion": False}, options, {**options, "method": "paper"}]


def test_the_demo_model_keeps_what_the_readme_says() -> None:
    """One picture by the defaults, in CI, without Inductor; the whole demo is below."""
    subject, requests = emoji(torch.device("cpu")), demo_requests([], 0)[:1]
    setting, eager = DemoRun(subject, 28, {}), {"inner_backend": "eager"}
    pipelines = subject.load(), compiled_pipeline(setting, backend="specdiff", options=eager)
    dense, default = (picture_maker(one, setting, 28)(requests[0]) for one in pipelines)
    fidelity = psnr(default, dense)
    assert 38 < fidelity < 60  # 40.9 measured; more would be a model that skips nothing
