"""The forms in which people deploy a transformer: each keeps the plan of whole steps.

Through diffusers' own FluxPipeline on small random weights, against the same form run dense.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor, nn

import specdiff
from tests.models import flux

STEPS = 28
DENSE = len(specdiff.Options(quality="balanced").resolve().plan.dense)
CPU = torch.device("cpu")
CLOSE = 0.02
"""Of a random model, which is rougher than a trained one; other weights are further than 0.03."""
EAGER = {"inner_backend": "eager"}

Change = Callable[[FluxPipeline], Any]
EXAMPLES = Path(__file__).parents[1] / "examples"
FORMS = runpy.run_path(str(EXAMPLES / "research" / "deployment_forms.py"), run_name="forms")
"""How models are deployed, as the table of forms has it."""


def pipeline() -> FluxPipeline:
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=flux()[0],
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: FluxPipeline, **kwargs: Any) -> Tensor:
    """The latent image."""
    generator = torch.Generator().manual_seed(1)
    return pipe(
        prompt_embeds=torch.randn(1, 4, 24, generator=generator),
        pooled_prompt_embeds=torch.randn(1, 20, generator=generator),
        height=64,
        width=96,
        num_inference_steps=STEPS,
        output_type="latent",
        generator=generator,
        **kwargs,
    ).images


def apart(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def compiled(pipe: FluxPipeline) -> None:
    pipe.transformer.compile(backend="specdiff", options=EAGER)


def attached(pipe: FluxPipeline) -> None:
    specdiff.attach(pipe.transformer)


def both(pipe: FluxPipeline) -> None:
    compiled(pipe)
    attached(pipe)


def check(pipe: FluxPipeline, expected: Tensor, **kwargs: Any) -> None:
    """A picture by whole steps, close to the dense one."""
    found = picture(pipe, **kwargs)
    stats = specdiff.stats(pipe.transformer)
    assert (stats.dense, stats.skipped, stats.fallbacks) == (DENSE, STEPS - DENSE, {})
    assert 0 < apart(found, expected) < CLOSE


def check_form(form: Change, *steps: Change) -> FluxPipeline:
    dense, pipe = pipeline(), pipeline()
    form(dense)
    expected = picture(dense)
    for step in steps:
        step(pipe)
    check(pipe, expected)
    return pipe


# Quantised ----------------------------------------------------------------------------------------


def linears(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "blocks" in name


def torchao(config: str) -> Change:
    def form(pipe: FluxPipeline) -> None:
        pytest.importorskip("torchao.quantization")
        FORMS["torchao"](config, linears)(pipe)

    return form


def gguf(pipe: FluxPipeline) -> None:
    pytest.importorskip("gguf")
    FORMS["gguf"](pipe, linears)


QUANTISED = {
    "int8 weight-only": torchao("Int8WeightOnlyConfig"),
    "int8 dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "float8 weight-only": torchao("Float8WeightOnlyConfig"),
    "gguf": gguf,
}


@pytest.mark.parametrize("way", [compiled, attached])
@pytest.mark.parametrize("form", QUANTISED)
def test_quantised(form, way, caplog):
    pipe = check_form(QUANTISED[form], QUANTISED[form], way)
    if way is compiled:
        assert specdiff.stats(pipe.transformer).no_selection == ""
        verification = specdiff.verify(pipe.transformer, **flux()[1])
        assert verification.passed and verification.selective
    assert "internal error" not in caplog.text
    assert not any(record.exc_info for record in caplog.records)


REFUSED = {8: "gives a weight other data", 4: "a subclass, Params4bit"}
"""By the bits of bitsandbytes, why no tokens can be selected."""


@pytest.mark.slow
@pytest.mark.parametrize("way", [compiled, attached])
@pytest.mark.parametrize("bits", REFUSED)
def test_linears_of_bitsandbytes(bits, way, caplog):
    pytest.importorskip("bitsandbytes")
    form = FORMS["bitsandbytes"](bits, linears)
    pipe = check_form(form, form, way)
    if way is compiled:
        assert REFUSED[bits] in specdiff.stats(pipe.transformer).no_selection
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was:UserWarning")
@pytest.mark.parametrize("way", [compiled, attached])
@pytest.mark.parametrize("quantised", ["int8 weight-only", "gguf"])
def test_adapters_on_quantised_weights(quantised, way):
    pytest.importorskip("peft")

    def form(pipe: FluxPipeline) -> None:
        QUANTISED[quantised](pipe)
        loads("one", 1)(pipe)

    check_form(form, form, way)


# Hooks --------------------------------------------------------------------------------------------


def layerwise_casting(pipe: FluxPipeline) -> None:
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def groups(kind: str, **options: Any) -> Change:
    def form(pipe: FluxPipeline) -> None:
        pipe.transformer.enable_group_offload(CPU, CPU, offload_type=kind, **options)

    return form


def model_offload(pipe: FluxPipeline) -> None:
    pytest.importorskip("accelerate")
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe: FluxPipeline) -> None:
    """What `enable_sequential_cpu_offload` does to each model; it refuses a CPU itself."""
    pytest.importorskip("accelerate").cpu_offload(pipe.transformer, CPU)


HOOKS = {
    "layerwise casting": layerwise_casting,
    "group offload, blocks": groups("block_level", num_blocks_per_group=1),
    "group offload, leaves": groups("leaf_level"),
    "model offload": model_offload,
    "sequential offload": sequential_offload,
}


@pytest.mark.parametrize("first", ["attach", "hook"])
@pytest.mark.parametrize("form", HOOKS)
def test_hooks_and_attach_in_both_orders(form, first):
    steps = (attached, HOOKS[form]) if first == "attach" else (HOOKS[form], attached)
    check_form(HOOKS[form], *steps)


def test_model_offload_of_a_compiled_model():
    check_form(model_offload, compiled, model_offload)


BROKEN = [
    pytest.param(name, marks=() if name == "group offload, blocks" else pytest.mark.slow)
    for name in HOOKS
    if name != "model offload"
]
"""Hooks at which Dynamo breaks graphs."""


@pytest.mark.parametrize("form", BROKEN)
def test_a_model_that_hooks_break_is_told_what_to_do(form, caplog):
    """No part of it is taken for the whole; attached, it is silent and has the plan."""
    dense, pipe = pipeline(), pipeline()
    for each in (dense, pipe):
        HOOKS[form](each)
    expected = picture(dense)
    compiled(pipe)
    torch.testing.assert_close(picture(pipe), expected, rtol=0, atol=0)
    (said,) = [r.getMessage() for r in caplog.records if r.name.startswith("specdiff")]
    assert "specdiff.attach(model), with the FluxTransformer2DModel as model" in said
    stats = specdiff.stats(pipe.transformer)
    assert (stats.dense, stats.skipped) == (STEPS, 0)

    specdiff.reset(pipe.transformer)
    caplog.clear()
    attached(pipe)
    check(pipe, expected)
    assert not [r for r in caplog.records if r.name.startswith("specdiff")]


# Adapters -----------------------------------------------------------------------------------------


def weights(seed: int, rank: int = 2) -> dict[str, Tensor]:
    """A LoRA file's content."""
    generator = torch.Generator().manual_seed(seed)
    places = ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn")
    return {
        f"transformer.{place}.{name}.lora_{end}.weight": torch.randn(shape, generator=generator) / 8
        for place in places
        for name in ("to_q", "to_k", "to_v")
        for end, shape in (("A", (rank, 32)), ("B", (32, rank)))
    }


def loads(name: str, seed: int, **options: Any) -> Change:
    return lambda pipe: pipe.load_lora_weights(weights(seed), adapter_name=name, **options)


def weighs(**strengths: float) -> Change:
    return lambda pipe: pipe.set_adapters(list(strengths), list(strengths.values()))


LIFE: dict[str, Change] = {
    "loaded": loads("one", 1),
    "weaker": weighs(one=0.5),
    "two": lambda pipe: (loads("two", 2)(pipe), weighs(one=0.5, two=1.0)(pipe)),
    "the other": weighs(two=0.7),
    "fused": lambda pipe: pipe.fuse_lora(adapter_names=["two"]),
    "unfused": lambda pipe: pipe.unfuse_lora(),
    "disabled": lambda pipe: pipe.disable_lora(),
    "unloaded": lambda pipe: pipe.unload_lora_weights(),
}
"""What may happen to adapters, in this order."""


def check_life(way: Change, start: int, changes: list[str]) -> None:
    """A picture after each change; the first of them happen before the model is accelerated."""
    pytest.importorskip("peft")
    dense, pipe = pipeline(), pipeline()
    for number, name in enumerate(changes):
        if number == start:
            way(pipe)
        for each in (dense, pipe):
            LIFE[name](each)
        if number >= start:
            specdiff.reset(pipe.transformer) if number > start else None
            check(pipe, picture(dense))


@pytest.mark.filterwarnings("ignore:Already found a:UserWarning")
@pytest.mark.parametrize("start", [0, 1])
def test_adapters_of_an_attached_model(start):
    check_life(attached, start, list(LIFE))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Already found a:UserWarning")
@pytest.mark.parametrize("start", [0, 1])
def test_adapters_of_a_compiled_model(start):
    check_life(compiled, start, list(LIFE))


@pytest.mark.parametrize("way", [attached, compiled])
def test_adapters_swapped_in_place(way):
    """Values change, and nothing else: nothing is compiled anew."""
    pytest.importorskip("peft")
    dense, pipe = pipeline(), pipeline()
    for each in (dense, pipe):
        each.enable_lora_hotswap(target_rank=4)
        loads("one", 1)(each)
    way(pipe)
    check(pipe, picture(dense))
    graphs = specdiff.stats(pipe.transformer).graphs
    for each in (dense, pipe):
        loads("one", 2, hotswap=True)(each)
    specdiff.reset(pipe.transformer)
    check(pipe, picture(dense))
    assert specdiff.stats(pipe.transformer).graphs == graphs


@pytest.mark.parametrize("way", [attached, pytest.param(compiled, marks=pytest.mark.slow)])
def test_strength_changed_in_mid_run(way):
    pytest.importorskip("peft")
    dense, pipe = pipeline(), pipeline()
    for each in (dense, pipe):
        loads("one", 1)(each)
    way(pipe)

    def weaker(pipe: FluxPipeline, step: int, time: Tensor, given: dict[str, Any]) -> Any:
        if step == STEPS // 2:
            weighs(one=0.4)(pipe)
        return given

    expected = picture(dense, callback_on_step_end=weaker)
    found = picture(pipe, callback_on_step_end=weaker)
    stats = specdiff.stats(pipe.transformer)
    again = 4 * (way is compiled)  # another graph begins its own generation
    assert (stats.dense, stats.fallbacks) == (DENSE + again, {})
    assert 0 < apart(found, expected) < CLOSE


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Already found a:UserWarning")
def test_past_the_limit_of_variants_stats_say_so(caplog):
    pytest.importorskip("peft")
    pipe = pipeline()
    compiled(pipe)
    with torch._dynamo.config.patch(recompile_limit=2):
        for number, rank in enumerate((1, 2, 3)):
            pipe.load_lora_weights(weights(number, rank), adapter_name=f"number {number}")
            pipe.set_adapters(f"number {number}")
            picture(pipe)
            stats = specdiff.stats(pipe.transformer)
            assert stats.last_variant == (number > 0)
    assert stats.evaluations == 2 * STEPS
    assert ("plain PyTorch" in str(stats)) == stats.last_variant
    assert caplog.text.count("use specdiff.attach(model)") == 1
    attached(pipe)
    specdiff.reset(pipe.transformer)
    picture(pipe)
    assert specdiff.stats(pipe.transformer).skipped == STEPS - DENSE
