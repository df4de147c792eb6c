"""Two processes that share a model: the same plan on each, without an exchange.

Where a decision reads values, every rank reads the same ones: those of the whole latent.
"""

from __future__ import annotations

import operator
import socket
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FluxPipeline
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import specdiff
from tests.models import flux
from tests.test_deployment import (
    CLOSE,
    DENSE,
    STEPS,
    apart,
    attached,
    compiled,
    picture,
    pipeline,
)

RANKS = 2


def fsdp(pipe: FluxPipeline) -> None:
    mesh, model = init_device_mesh("cpu", (RANKS,)), pipe.transformer
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def tensor_parallel(pipe: FluxPipeline) -> None:
    plan = {"ff.net.0.proj": ColwiseParallel(), "ff.net.2": RowwiseParallel()}
    for block in pipe.transformer.transformer_blocks:
        parallelize_module(block, init_device_mesh("cpu", (RANKS,)), plan)


def ulysses(pipe: FluxPipeline) -> None:
    with mock.patch("torch.accelerator.device_count", return_value=1):  # it divides by it
        config = ContextParallelConfig(ulysses_degree=RANKS)
        pipe.transformer.enable_parallelism(config=config)


FORMS = {"fsdp": fsdp, "tensor parallel": tensor_parallel, "ulysses": ulysses}


def work(rank: int, port: int, form: str) -> None:
    """One process: pictures of the form dense, attached, and compiled where it is one graph."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=RANKS)
    whole = picture(pipeline())
    ways = (attached,) if form == "fsdp" else (attached, compiled)
    for way in ways:
        pipe = pipeline()
        FORMS[form](pipe)
        expected = picture(pipe)
        assert apart(expected, whole) < 1e-5
        way(pipe)
        found = picture(pipe)
        assert 0 < apart(found, expected) < CLOSE
        stats = specdiff.stats(pipe.transformer)
        assert (stats.dense, stats.skipped, stats.fallbacks) == (DENSE, STEPS - DENSE, {})
        assert same_everywhere(found)
        specdiff.reset(pipe.transformer)
        with specdiff.record(pipe.transformer) as recording:
            disturbed = picture(pipe, callback_on_step_end=disturb)
        reasons = [step.reason for step in recording.steps]
        assert "unexplained step" in reasons
        assert same_everywhere(disturbed) and same_everywhere(reasons)
    dist.destroy_process_group()


def disturb(pipe: FluxPipeline, step: int, time: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """Fresh noise in mid-run, the same on every rank."""
    if step in (9, 16):
        made = torch.Generator().manual_seed(step)
        noise = torch.randn(given["latents"].shape, generator=made)
        given["latents"] = given["latents"] + 0.1 * noise
    return given


def same_everywhere(value: Any) -> bool:
    """Whether every rank has the same, to the bit."""
    values: list[Any] = [None] * RANKS
    dist.all_gather_object(values, value)
    same = torch.equal if isinstance(value, Tensor) else operator.eq
    return all(same(other, value) for other in values)


class Guided(nn.Module):
    """Guidance with a half on each rank, which then gives what both make."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompts: Tensor, **rest: Any) -> Any:
        own = prompts[dist.get_rank()]
        call = {**rest, "encoder_hidden_states": own, "return_dict": False}
        velocity = self.model(hidden_states=hidden_states, timestep=timestep, **call)[0]
        halves = [torch.empty_like(velocity) for _ in range(RANKS)]
        dist.all_gather(halves, velocity.contiguous())
        return torch.lerp(*halves, 3.0)


@torch.no_grad()
def guided(model: Guided) -> Tensor:
    """Euler on a flow."""
    call = dict(flux(layers=1, single_layers=1, batch=1)[1])
    latent, text = call.pop("hidden_states"), call.pop("encoder_hidden_states")
    call.update(prompts=torch.stack([text, text.flip(-1)]))
    for now, then in pairwise(torch.linspace(1, 0, STEPS + 1).tolist()):
        call["timestep"] = torch.full((1,), now)
        latent = latent + (then - now) * model(latent, **call)
    return latent


def halves(rank: int, port: int) -> None:
    """One process: guidance attached where both halves have come together."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=RANKS)
    model = Guided(flux(layers=1, single_layers=1, batch=1)[0])
    expected = guided(model)
    specdiff.attach(model)
    found = guided(model)
    stats = specdiff.stats(model)
    assert (stats.dense, stats.skipped, stats.fallbacks) == (DENSE, STEPS - DENSE, {})
    assert 0 < apart(found, expected) < CLOSE and same_everywhere(found)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_rank_takes_the_same_steps(form):
    torch.multiprocessing.spawn(work, (free_port(), form), nprocs=RANKS)


@pytest.mark.slow
def test_guidance_with_a_half_on_each_rank():
    torch.multiprocessing.spawn(halves, (free_port(),), nprocs=RANKS)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
