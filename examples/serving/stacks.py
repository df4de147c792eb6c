"""What the scripts of the serving stacks share: small inputs, an Euler loop, and a table.

    python examples/serving/stack_xdit.py --markdown examples/serving/stacks.md

Each script loads the denoisers of one stack from its own wheel, with small sizes and random
weights, and has each draw on a CPU: eager, then under specdiff whole, by blocks as the stack
compiles them, and attached alone. So a table says what is accelerated, not how fast or how good.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

import specdiff
from specdiff.plan import Plan

STEPS = 10
SIDE, TEXT = 16, 16
"""Image tokens along a side, text tokens."""
HEADS: dict[str, int] = {"num_attention_heads": 2, "attention_head_dim": 32}
AXES = (8, 12, 12)
FLUX: dict[str, Any] = {
    "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2,
    "joint_attention_dim": 48, "pooled_projection_dim": 24, "guidance_embeds": False,
    "axes_dims_rope": AXES, **HEADS,
}  # fmt: skip
SD3: dict[str, Any] = {
    "sample_size": 32, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
    "joint_attention_dim": 48, "caption_projection_dim": 64, "pooled_projection_dim": 24,
    "pos_embed_max_size": 32, **HEADS,
}  # fmt: skip
QWEN: dict[str, Any] = {
    "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2,
    "joint_attention_dim": 48, "axes_dims_rope": AXES, **HEADS,
}  # fmt: skip
WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2), "in_channels": 4, "out_channels": 4, "text_dim": 48, "freq_dim": 32,
    "ffn_dim": 128, "num_layers": 2, "rope_max_seq_len": 64, **HEADS,
}  # fmt: skip
"""Sizes by the names that diffusers and the stacks share."""

SELECTING = {"cache_ratio": 0.5}
COMPUTING = {"plan": Plan.every(1), "cache_ratio": 0.5}
"""Every token, by the programs of a plan that selects."""


@dataclass(frozen=True)
class Denoiser:
    """A model of a stack and what its pipeline calls it with."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Mapping[str, Any]
    """All but the time; the latent is `hidden_states`."""
    unit: float = 1.0
    """The time of pure noise."""


@dataclass(frozen=True)
class Stack:
    """One serving stack: its denoisers, its ways to compile, and what surrounds a call."""

    name: str
    packages: Sequence[str]
    denoisers: Sequence[Denoiser]
    whole: Callable[[nn.Module], nn.Module]
    """Compiles a model as the stack does, naming no backend."""
    by_blocks: Callable[[nn.Module], None]
    around: Callable[[int], AbstractContextManager[Any]]
    """What is entered around the call of a step."""
    plugins: Callable[[], None] | None = None
    """Runs the entry points of its plug-in group, as its workers do."""


def flux_inputs() -> dict[str, Any]:
    """As FluxPipeline calls it."""
    ids = torch.zeros(SIDE, SIDE, 3)
    ids[..., 1] += torch.arange(SIDE)[:, None]
    ids[..., 2] += torch.arange(SIDE)
    return {
        "hidden_states": noise(SIDE * SIDE, 16), "encoder_hidden_states": noise(TEXT, 48),
        "pooled_projections": noise(24), "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(TEXT, 3), "guidance": None, "return_dict": False,
    }  # fmt: skip


def sd3_inputs() -> dict[str, Any]:
    """As StableDiffusion3Pipeline calls it."""
    return {
        "hidden_states": noise(4, 2 * SIDE, 2 * SIDE), "encoder_hidden_states": noise(TEXT, 48),
        "pooled_projections": noise(24), "return_dict": False,
    }  # fmt: skip


def qwen_inputs() -> dict[str, Any]:
    """As QwenImagePipeline calls it."""
    return {
        "hidden_states": noise(SIDE * SIDE, 16), "encoder_hidden_states": noise(TEXT, 48),
        "img_shapes": [[(1, SIDE, SIDE)]], "txt_seq_lens": [TEXT], "guidance": None,
        "attention_kwargs": {}, "return_dict": False,
    }  # fmt: skip


def wan_inputs() -> dict[str, Any]:
    """As WanPipeline calls it: two frames."""
    return {
        "hidden_states": noise(4, 2, 2 * SIDE, 2 * SIDE), "encoder_hidden_states": noise(TEXT, 48),
        "return_dict": False,
    }  # fmt: skip


def noise(*shape: int) -> Tensor:
    """One sample, the same for every stack."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(sum(shape)))


def randomized(model: nn.Module) -> nn.Module:
    """With weights that every stack draws alike: small, norms about 1."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.08 if parameter.ndim > 1 else 0.02
            shift = float(parameter.ndim == 1 and "norm" in name and name.endswith("weight"))
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(scale * drawn + shift)
    return model.eval().requires_grad_(False)


def absent(*names: str) -> None:
    """Stand-ins for modules that have no wheel for this machine; nothing of them may run."""
    for name in names:
        module = MagicMock(name=name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        sys.modules.setdefault(name, module)


def draw(stack: Stack, denoiser: Denoiser, call: Callable[..., Any]) -> Tensor:
    """Euler along a flow with shifted times; conditions are the same tensors throughout."""
    times = torch.linspace(1, 0, STEPS + 1)
    times = 3 * times / (1 + 2 * times)
    conditions = dict(denoiser.inputs)
    latent = conditions.pop("hidden_states")
    for i, (now, then) in enumerate(pairwise(times)):
        with stack.around(i):
            output = call(hidden_states=latent, timestep=now[None] * denoiser.unit, **conditions)
        velocity = output if isinstance(output, Tensor) else output[0]
        velocity = velocity if isinstance(velocity, Tensor) else velocity[0]
        latent = latent + (then - now) * velocity
    return latent


class Said(logging.Handler):
    """What specdiff logged, each message once."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.messages: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.messages[record.getMessage()] = None


@contextmanager
def listening() -> Iterator[dict[str, None]]:
    """What is logged until the end."""
    said, log = Said(), logging.getLogger("specdiff")
    log.setLevel(logging.INFO)
    log.addHandler(said)
    try:
        yield said.messages
    finally:
        log.removeHandler(said)


WAYS = ("whole", "by blocks", "attached")


def prepared(stack: Stack, model: nn.Module, way: str, inner: str) -> nn.Module:
    """The model, compiled as the stack does with specdiff as what compiles for all."""
    torch.compiler.reset()
    torch.compiler.set_default_backend(specdiff.backend(inner_backend=inner))
    if way == "whole":
        return stack.whole(model)
    if way == "by blocks":
        stack.by_blocks(model)
    specdiff.attach(model)
    return model


def row(stack: Stack, denoiser: Denoiser, way: str, dense: Tensor, inner: str) -> str:
    """A line of the table."""
    model = randomized(denoiser.build())
    with listening() as said:
        try:
            call = prepared(stack, model, way, inner)
        except ValueError as error:
            return f"| {denoiser.name} | {way} | the stack refuses: {error} | | | | | |"
        drawn, stats = {}, {}
        for name, options in (("steps", {}), ("tokens", SELECTING), ("all", COMPUTING)):
            specdiff.configure(model, **{"plan": None, "cache_ratio": None, **options})
            drawn[name] = draw(stack, denoiser, call)
            stats[name] = specdiff.stats(model)
            specdiff.reset(model)
    by_steps, by_tokens = stats["steps"], stats["tokens"]
    plan = f"yes, {by_steps.skipped} of {STEPS} forecast" if by_steps.skipped else "no"
    plan += f": {by_steps.no_step_plan}" if by_steps.no_step_plan else ""
    chosen = f"yes, {by_tokens.selective} of {STEPS} selective" if by_tokens.selective else "no"
    chosen += f": {by_tokens.no_selection}" if by_tokens.no_selection else ""
    apart = [f"{relative(drawn[name], dense):.1e}" for name in ("all", "steps", "tokens")]
    cells = (denoiser.name, way, plan, chosen, *apart, "; ".join(said) or "nothing")
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def relative(drawn: Tensor, dense: Tensor) -> float:
    """The largest difference, by the largest value."""
    return ((drawn - dense).abs().max() / dense.abs().max()).item()


HEAD = (
    "| model | compiled | step plan | token selection | all computed, apart | forecast, apart"
    " | selective, apart | said |\n|---|---|---|---|---|---|---|---|"
)


def switched_on(stack: Stack) -> str:
    """Whether the stack's own loading of plug-ins makes specdiff what compiles for all."""
    if stack.plugins is None:
        return "It has no plug-ins."
    os.environ["SPECDIFF"] = "balanced"
    stack.plugins()
    del os.environ["SPECDIFF"]
    default = torch.compiler.get_default_backend()
    given = f"{default.func.__name__}, {default.keywords['options']}"
    return f"Its plug-ins, with SPECDIFF=balanced, make the default backend {given}."


def main(stack: Stack) -> None:
    """Print the table of a stack, or write it."""
    parser = argparse.ArgumentParser(description=f"{stack.name}: its denoisers under specdiff")
    parser.add_argument("--models", nargs="+", help="default: all")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--inner", default="eager", help="inner_backend")
    parser.add_argument("--markdown", type=Path, help="file that the table is appended to")
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    versions = ", ".join(f"{name} {version(name)}" for name in (*stack.packages, "torch"))
    _write(f"\n## {stack.name}\n\n{versions}; {datetime.date.today()}.", given.markdown)
    for note in ("", switched_on(stack), "", HEAD):
        _write(note, given.markdown)
    for denoiser in stack.denoisers:
        if given.models and denoiser.name not in given.models:
            continue
        dense = draw(stack, denoiser, randomized(denoiser.build()))
        for way in given.ways:
            _write(row(stack, denoiser, way, dense, given.inner), given.markdown)


def _write(line: str, file: Path | None) -> None:
    print(line, flush=True)
    if file is not None:
        with file.open("a", encoding="utf-8") as out:
            out.write(line + "\n")


def namespace(**values: Any) -> Any:
    """An object with these attributes; all others are None."""

    class Missing(types.SimpleNamespace):
        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    return Missing(**values)
