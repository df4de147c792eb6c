"""Two processes that share a model: the same plan on each, without an exchange."""

from __future__ import annotations

import socket
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FluxPipeline
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import specdiff
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
        others = [torch.empty_like(found) for _ in range(RANKS)]
        dist.all_gather(others, found)
        assert all(torch.equal(other, found) for other in others)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_rank_takes_the_same_steps(form):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, form), nprocs=RANKS)
