"""The forms that `deployment.py` measures: what people do to a model before they call it."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from specdiff.models.subject import STEPS

CPU = torch.device("cpu")
Change = Callable[[Any], Any]
WEAKER = 0.4
"""Strength of an adapter, once it has been changed."""


def nothing(pipe: Any) -> None:
    """As it is."""


@dataclass(frozen=True)
class Form:
    """How a model is deployed."""

    name: str
    ways: tuple[str, ...] = ("attached",)
    """How it is accelerated, each a line of the table."""
    before: Change = nothing
    """Before it is accelerated."""
    after: Change = nothing
    between: Change = nothing
    """After a first picture."""
    each_step: Callable[..., dict[str, Any]] | None = None
    """The pipeline's callback."""
    rest: Change = nothing
    """After each picture."""
    processes: int = 1


Wanted = Callable[[nn.Module, str], bool]
"""Whether a module of this name is a linear to quantise."""


def blocks(module: nn.Module, name: str) -> bool:
    """Linears that are quantised."""
    return isinstance(module, nn.Linear) and "blocks" in name and module.in_features >= 64


def torchao(config: str, wanted: Wanted = blocks) -> Change:
    """Linears quantised by a config of torchao."""

    def form(pipe: Any) -> None:
        from torchao import quantization

        made = getattr(quantization, config)()
        quantization.quantize_(pipe.transformer, made, filter_fn=wanted)

    return form


def gguf(pipe: Any, wanted: Wanted = blocks) -> None:
    """As `from_single_file` leaves a model: packed weights, unpacked in each forward."""
    import gguf as packing
    from diffusers.quantizers.gguf.utils import GGUFParameter, _replace_with_gguf_linear

    model, kind = pipe.transformer, packing.GGMLQuantizationType.Q8_0
    kept = {n: m for n, m in model.named_modules() if wanted(m, n) and m.in_features % 32 == 0}
    packed = {
        f"{name}.weight": GGUFParameter(
            torch.from_numpy(packing.quants.quantize(module.weight.detach().numpy(), kind)),
            quant_type=kind,
        )
        for name, module in kept.items()
    }
    _replace_with_gguf_linear(model, torch.float32, packed)
    for name, module in kept.items():
        linear = model.get_submodule(name)
        linear.weight = packed[f"{name}.weight"]
        if module.bias is not None:
            linear.bias = nn.Parameter(module.bias.detach(), requires_grad=False)


def bitsandbytes(bits: int, wanted: Wanted = blocks) -> Change:
    """Linears of bitsandbytes: 8 bits, or 4 as NF4."""

    def form(pipe: Any) -> None:
        import bitsandbytes as library

        model = pipe.transformer
        for name, module in [each for each in model.named_modules() if wanted(each[1], each[0])]:
            sizes, bias = (module.in_features, module.out_features), module.bias is not None
            if bits == 8:
                linear = library.nn.Linear8bitLt(*sizes, bias, has_fp16_weights=False)
            else:
                linear = library.nn.Linear4bit(
                    *sizes, bias, compute_dtype=torch.float32, quant_type="nf4"
                )
            linear.load_state_dict(module.state_dict())
            linear = linear.to(CPU)
            linear(torch.zeros(1, module.in_features))  # the first call arranges the codes
            place, _, own = name.rpartition(".")
            setattr(model.get_submodule(place), own, linear)

    return form


def layerwise_casting(pipe: Any) -> None:
    """Weights kept in float8, cast for each layer."""
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def groups(kind: str, **options: Any) -> Change:
    """Group offload; both devices are the CPU, and the hooks run."""
    return lambda pipe: pipe.transformer.enable_group_offload(
        CPU, CPU, offload_type=kind, **options
    )


def model_offload(pipe: Any) -> None:
    """The pipeline's own."""
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe: Any) -> None:
    """What `enable_sequential_cpu_offload` does to a model; it refuses a CPU itself."""
    from accelerate import cpu_offload

    cpu_offload(pipe.transformer, CPU)


def breaks(pipe: Any) -> None:
    """A graph break before each block."""
    for block in (
        *pipe.transformer.transformer_blocks,
        *pipe.transformer.single_transformer_blocks,
    ):
        block.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())


def adapter(seed: int, **options: Any) -> Change:
    """Loads a LoRA of random weights."""

    def load(pipe: Any) -> None:
        generator = torch.Generator().manual_seed(seed)
        names = [
            (f"{place}.{name}", module)
            for place, block in pipe.transformer.named_modules()
            if place.endswith(".attn")
            for name in ("to_q", "to_k", "to_v")
            if isinstance(module := getattr(block, name, None), nn.Module)
        ]
        weights = {
            f"transformer.{name}.lora_{end}.weight": torch.randn(shape, generator=generator) / 32
            for name, module in names
            for end, shape in (("A", (4, module.in_features)), ("B", (module.out_features, 4)))
        }
        pipe.load_lora_weights(weights, adapter_name="one", **options)

    return load


def both(*changes: Change) -> Change:
    """One after the other."""

    def form(pipe: Any) -> None:
        for change in changes:
            change(pipe)

    return form


def swappable(pipe: Any) -> None:
    """An adapter whose values can be replaced in place."""
    pipe.transformer.enable_lora_hotswap(target_rank=4)
    adapter(1)(pipe)


def weigh(pipe: Any, strength: float) -> None:
    """The adapter's strength."""
    pipe.set_adapters(["one"], [strength])


def weaker(pipe: Any, step: int, time: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """A callback that changes the strength half-way."""
    if step == STEPS // 2:
        weigh(pipe, WEAKER)
    return given


def fsdp(pipe: Any) -> None:
    """Each block sharded, and the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, model = init_device_mesh("cpu", (dist.get_world_size(),)), pipe.transformer
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def tensor_parallel(pipe: Any) -> None:
    """The feed-forward of each block."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"ff.net.0.proj": ColwiseParallel(), "ff.net.2": RowwiseParallel()}
    for block in pipe.transformer.transformer_blocks:
        parallelize_module(block, mesh, plan)


def context_parallel(pipe: Any, **degrees: int) -> None:
    """Diffusers' own."""
    from diffusers import ContextParallelConfig

    with mock.patch("torch.accelerator.device_count", return_value=1):  # it divides by it
        pipe.transformer.enable_parallelism(config=ContextParallelConfig(**degrees))


def in_processes(count: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns, of the first of so many processes that call each other by gloo."""
    if count == 1:
        return work(*arguments)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "found"
        torch.multiprocessing.spawn(
            _process, (count, free_port(), place, work, *arguments), nprocs=count
        )
        return pickle.loads(place.read_bytes())


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def _process(
    rank: int, count: int, port: int, place: Path, work: Callable[..., Any], *arguments: Any
) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    dist.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=count)
    found = work(*arguments)
    if rank == 0:
        place.write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


SELECTING = ("compiled", "compiled, cache_ratio=0.75")
FORMS = (
    Form("plain", (*SELECTING, "compiled by blocks, attached", "attached")),
    Form(
        "torchao int8 weight-only", (*SELECTING, "attached"), before=torchao("Int8WeightOnlyConfig")
    ),
    Form(
        "torchao int8 dynamic",
        (*SELECTING, "attached"),
        before=torchao("Int8DynamicActivationInt8WeightConfig"),
    ),
    Form("torchao float8 weight-only", ("compiled",), before=torchao("Float8WeightOnlyConfig")),
    Form(
        "torchao float8 dynamic",
        ("compiled",),
        before=torchao("Float8DynamicActivationFloat8WeightConfig"),
    ),
    Form("torchao int4 weight-only", ("compiled",), before=torchao("Int4WeightOnlyConfig")),
    Form("GGUF Q8_0", (*SELECTING, "attached"), before=gguf),
    Form("bitsandbytes int8", ("compiled", "attached"), before=bitsandbytes(8)),
    Form("bitsandbytes NF4", ("compiled", "attached"), before=bitsandbytes(4)),
    Form("layerwise casting", before=layerwise_casting),
    Form("model offload", ("compiled", "attached"), before=model_offload),
    Form("sequential offload", before=sequential_offload),
    Form("group offload, blocks", before=groups("block_level", num_blocks_per_group=1)),
    Form("group offload, leaves", before=groups("leaf_level")),
    Form("group offload, leaves, streams", before=groups("leaf_level", use_stream=True)),
    Form("graph breaks", ("compiled", "compiled, attached"), before=breaks),
    Form("LoRA loaded after compiling", ("compiled", "attached"), after=adapter(1)),
    Form(
        "LoRA swapped in place",
        ("compiled", "attached"),
        before=swappable,
        between=adapter(2, hotswap=True),
    ),
    Form(
        "LoRA's strength changed half-way",
        ("compiled", "attached"),
        before=adapter(1),
        each_step=weaker,
        rest=lambda pipe: weigh(pipe, 1.0),
    ),
    Form(
        "LoRA on torchao int8 weight-only",
        ("compiled", "attached"),
        before=both(torchao("Int8WeightOnlyConfig"), adapter(1)),
    ),
    Form("LoRA on GGUF Q8_0", ("compiled", "attached"), before=both(gguf, adapter(1))),
    Form("FSDP2, two processes", before=fsdp, processes=2),
    Form(
        "tensor parallel, two processes",
        ("compiled", "attached"),
        before=tensor_parallel,
        processes=2,
    ),
    Form(
        "Ulysses, two processes",
        ("compiled", "attached"),
        before=partial(context_parallel, ulysses_degree=2),
        processes=2,
    ),
    Form("ring, two processes", before=partial(context_parallel, ring_degree=2), processes=2),
    Form(
        "Ulysses and ring, four processes",
        before=partial(context_parallel, ulysses_degree=2, ring_degree=2),
        processes=4,
    ),
)
