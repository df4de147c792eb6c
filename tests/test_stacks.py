"""Serving stacks: their call forms, under a default backend and nothing of theirs changed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import specdiff
from specdiff import torch_adapter
from specdiff.errors import OptionError
from specdiff.integrations.switch import switch_on
from specdiff.plan import Plan
from tests.helpers import step_counts
from tests.models import randomize

STEPS = 10
TOKENS, TEXT, CHANNELS = 12, 3, 8
SELECTING: dict[str, Any] = {"plan": Plan.every(4, warmup=2), "cache_ratio": 0.5}
WHOLE = {"plan": Plan.every(4, warmup=2)}
SELECTED, SKIPPED = (4, 6, 0), (4, 0, 6)
"""Dense, selective and skipped steps."""

pytestmark = pytest.mark.skipif(
    torch_adapter.default_backend() is None, reason="this torch has no default backend"
)


class Block(nn.Module):
    """Attention over image and text, in a stack's ways: keywords, two streams."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.norm = nn.LayerNorm(CHANNELS)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> Tensor:
        joint = self.norm(torch.cat([encoder_hidden_states, hidden_states], 1)) * temb[:, None]
        heads = self.qkv(joint).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*heads)
        return hidden_states + self.out(attended.transpose(1, 2).flatten(2))[:, TEXT:]


class Transformer(nn.Module):
    """A denoiser; like Wan in vLLM-omni it keeps a table of its positions on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, CHANNELS), nn.Linear(CHANNELS, 4)
        self.prompt, self.time = nn.Linear(5, CHANNELS), nn.Linear(1, CHANNELS)
        self.transformer_blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor
    ) -> tuple[Tensor]:
        self.table = torch.arange(TOKENS, device=hidden_states.device).cos()[None, :, None]
        x, text = self.embed(hidden_states) + self.table, self.prompt(encoder_hidden_states)
        temb = self.time(timestep[:, None])
        for block in self.transformer_blocks:
            x = block(x, encoder_hidden_states=text, temb=temb)
        return (self.head(x),)


@pytest.fixture
def _default() -> Iterator[None]:
    """What a test makes the default backend, others do not get."""
    yield
    torch_adapter.set_default_backend("inductor")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return randomize(Transformer())


def generate(denoise: Callable[..., Any], positional: bool = False, keep: bool = True) -> Tensor:
    """Euler on a flow; the prompt is one tensor throughout, or with not `keep` made anew."""
    torch.manual_seed(1)
    latent, prompt = torch.randn(1, TOKENS, 4), torch.randn(1, TEXT, 5)
    for now, then in pairwise(torch.linspace(1, 0, STEPS + 1)):
        text = prompt if keep else prompt.clone()
        if positional:
            (velocity,) = denoise(latent, text, now[None])
        else:
            (velocity,) = denoise(
                hidden_states=latent, encoder_hidden_states=text, timestep=now[None]
            )
        latent = latent + (then - now) * velocity
    return latent


def module_compile(model: nn.Module, **options: Any) -> nn.Module:
    model.compile(**options)
    return model


def compiled_forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward)  # type: ignore[method-assign]
    return model


WHOLE_MODEL: dict[str, Callable[[nn.Module], Any]] = {
    "vLLM-omni, full": lambda model: module_compile(model, dynamic=True),
    "SGLang": lambda model: module_compile(
        model, fullgraph=False, dynamic=None, mode="max-autotune-no-cudagraphs"
    ),
    "xDiT": lambda model: torch.compile(model, mode="default", dynamic=None),
    "xDiT, old pipelines": compiled_forward,
    "cache-dit": lambda model: torch.compile(
        model, fullgraph=False, mode=None, dynamic=None, options=None
    ),
}


@pytest.mark.usefixtures("_default")
@pytest.mark.parametrize("form", WHOLE_MODEL)
def test_a_model_that_is_compiled_whole(model, form):
    torch_adapter.set_default_backend(specdiff.backend(**SELECTING, inner_backend="eager"))
    with torch.inference_mode():
        dense = generate(model)
        drawn = generate(WHOLE_MODEL[form](model))
    assert step_counts(model) == SELECTED
    assert 0 < (drawn - dense).norm() < 0.1 * dense.norm()


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.usefixtures("_default")
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("positional", [False, True], ids=["by name", "by position"])
def test_how_it_is_called(model, context, positional):
    torch_adapter.set_default_backend(specdiff.backend(**SELECTING, inner_backend="eager"))
    model.compile()
    with torch.no_grad(), CONTEXTS[context]():
        generate(model, positional, keep=positional)
    assert step_counts(model) == SELECTED


def _forwards(model: nn.Module) -> None:
    for block in model.transformer_blocks:
        block.forward = torch.compile(block.forward, dynamic=True)


def _replaced(model: nn.Module) -> None:
    for i, block in enumerate(model.transformer_blocks):
        model.transformer_blocks[i] = torch.compile(block)


def _in_place(model: nn.Module) -> None:
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, mode="max-autotune-no-cudagraphs")


REGIONAL = {
    "vLLM-omni, regional": _forwards,
    "xDiT, block_list[i]": _replaced,
    "diffusers, compile_repeated_blocks": _in_place,
}


@pytest.mark.usefixtures("_default")
@pytest.mark.parametrize("form", REGIONAL)
def test_a_model_that_is_compiled_block_by_block(model, form, caplog):
    """Nobody sees its steps, and the log says which line is missing."""
    torch_adapter.set_default_backend(specdiff.backend(inner_backend="eager"))
    with torch.inference_mode(), caplog.at_level(logging.INFO, "specdiff"):
        dense = generate(model)
        REGIONAL[form](model)
        torch.testing.assert_close(generate(model), dense)
        assert "specdiff.attach(model)" in caplog.text
        specdiff.attach(model, **SELECTING)
        generate(model)
    dense_steps, selected, skipped = step_counts(model)
    assert (selected, skipped) == (6, 0), dense_steps


class Encoder(nn.Module):
    """A text encoder: attention over its own tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(9, CHANNELS), Block()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        return self.layer(x, x[:, :TEXT], x[:, 0])


class Decoder(nn.Module):
    """A VAE's; some are told a time, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(4, 8, 3, padding=1), nn.ConvTranspose2d(8, 3, 2, stride=2)

    def forward(self, z: Tensor, timestep: Tensor | None = None) -> Tensor:
        y = self.up(self.conv(z).relu())
        return y if timestep is None else y + timestep


@pytest.mark.usefixtures("_default")
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (Encoder, (torch.arange(7)[None],)),
        (Decoder, (torch.randn(1, 4, 6, 6),)),
        (Decoder, (torch.randn(1, 4, 6, 6), torch.ones(1))),
    ],
    ids=["text encoder", "VAE", "VAE with a time"],
)
def test_what_denoises_nothing_is_compiled_as_before(build, inputs, dynamic, caplog):
    torch_adapter.set_default_backend(specdiff.backend(inner_backend="eager"))
    module = randomize(build())
    with torch.no_grad(), caplog.at_level(logging.INFO):
        expected = module(*inputs)
        module.compile(dynamic=dynamic)
        for _ in range(2):
            torch.testing.assert_close(module(*inputs), expected)
    if dynamic is None or len(inputs) == 1:
        assert not caplog.records
        with pytest.raises(specdiff.NotCompiledError):
            specdiff.stats(module)


class Writing(Transformer):
    """A denoiser of which no call may be left out."""

    def forward(self, hidden_states: Tensor, **inputs: Tensor) -> tuple[Tensor]:
        hidden_states.mul_(1.0)
        return super().forward(hidden_states, **inputs)


@pytest.mark.usefixtures("_default")
def test_a_denoiser_that_runs_dense_says_so(caplog):
    torch_adapter.set_default_backend(specdiff.backend(inner_backend="eager"))
    model = module_compile(randomize(Writing()))
    with torch.no_grad(), caplog.at_level(logging.INFO):
        generate(model)
    assert "running dense: the graph writes to one of its inputs" in caplog.text


@pytest.mark.usefixtures("_default")
def test_the_environment_variable_switches_on(model, monkeypatch):
    groups = ("vllm_omni.general_plugins", "sglang.multimodal_gen.plugins")
    points = [point for group in groups for point in entry_points(group=group, name="specdiff")]
    assert [point.load() for point in points] == [switch_on] * 2
    monkeypatch.setenv("SPECDIFF", "fast")
    for point in points:
        point.load()()
    default = torch_adapter.default_backend()
    assert default.keywords == {"options": {"quality": "fast"}}


@pytest.mark.usefixtures("_default")
@pytest.mark.parametrize("value", ["", "off", "dense", None])
def test_without_the_variable_nothing_happens(value, monkeypatch):
    monkeypatch.delenv("SPECDIFF", raising=False)
    if value is not None:
        monkeypatch.setenv("SPECDIFF", value)
    switch_on()
    assert torch_adapter.default_backend() == "inductor"


@pytest.mark.usefixtures("_default")
def test_the_variable_may_name_a_plan(model, monkeypatch, tmp_path: Path):
    plan = tmp_path / "plan.json"
    WHOLE["plan"].save(plan)
    monkeypatch.setenv("SPECDIFF", str(plan))
    switch_on()
    options = {**torch_adapter.default_backend().keywords["options"], "inner_backend": "eager"}
    torch_adapter.set_default_backend(specdiff.backend(**options))
    with torch.no_grad():
        generate(module_compile(model))
    assert step_counts(model) == SKIPPED


def test_a_wrong_value_is_an_error(monkeypatch):
    monkeypatch.setenv("SPECDIFF", "balancd")
    with pytest.raises(OptionError, match="SPECDIFF='balancd': must be off, one of closest, "):
        switch_on()


@pytest.mark.usefixtures("_default")
def test_a_default_that_somebody_else_chose_stays(monkeypatch, caplog):
    torch_adapter.set_default_backend("eager")
    monkeypatch.setenv("SPECDIFF", "fast")
    switch_on()
    assert torch_adapter.default_backend() == "eager"
    assert "'eager' is the default backend already" in caplog.text


class Loaded(nn.Parameter):
    """As vLLM's parameters: they know how they are loaded, and answer as any tensor does."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return super().__torch_function__(function, types, args, kwargs or {})


Loaded.__module__ = "vllm.model_executor.parameter"


def loaded(model: nn.Module) -> nn.Module:
    """With weights of vLLM's class, one of them transposed as those of 8 bits are."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = Loaded(module.weight.detach().t().contiguous().t(), False)
    return model


@pytest.mark.usefixtures("_default")
@pytest.mark.parametrize("dynamic", [None, True])
def test_weights_of_vllm(model, dynamic):
    torch_adapter.set_default_backend(specdiff.backend(**SELECTING, inner_backend="aot_eager"))
    with torch.inference_mode():
        dense = generate(loaded(model))
        drawn = generate(module_compile(model, dynamic=dynamic))
    assert step_counts(model) == SELECTED
    assert 0 < (drawn - dense).norm() < 0.1 * dense.norm()


@pytest.mark.usefixtures("_default")
def test_weights_of_vllm_by_blocks(model):
    torch_adapter.set_default_backend(specdiff.backend(inner_backend="eager"))
    _forwards(loaded(model))
    specdiff.attach(model, **SELECTING)
    with torch.inference_mode():
        generate(model)
    assert step_counts(model)[1:] == (6, 0)
