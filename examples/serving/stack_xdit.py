"""xDiT's denoisers on a CPU, one rank.

    pip install --no-deps xfuser==0.7.0 distvae yunchang einops triton
    pip install diffusers transformers
    python examples/serving/stack_xdit.py --markdown examples/serving/stacks.md

xfuser is imported as if torch had CUDA, as it raises otherwise; the models run on the CPU, with
`attention_backend` SDPA. One rank has no collectives to make.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import stacks
import torch
from torch import nn

ONE_RANK = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29811", "RANK": "0", "LOCAL_RANK": "0"}


def start() -> None:
    """Import it, and make what its models ask for: groups of one rank, and a runtime state."""
    os.environ.update(ONE_RANK, WORLD_SIZE="1")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    torch.version.cuda = "13.0"
    from xfuser.core.distributed import parallel_state, runtime_state
    from xfuser.core.distributed.attention_backend import AttentionBackendType

    torch.version.cuda = None
    parallel_state.init_distributed_environment(1, 0, local_rank=0, backend="gloo")
    parallel_state.initialize_model_parallel(backend="gloo")
    runtime_state._RUNTIME = _state(AttentionBackendType.SDPA)


def _state(backend: Any) -> Any:
    """What RuntimeState holds while a picture is drawn."""
    side = 2 * stacks.SIDE
    return SimpleNamespace(
        attention_backend=backend,
        cross_attention_backend=None,
        get_cross_attention_backend=lambda: None,
        increment_step_counter=lambda: None,
        fp8_comms=None,
        num_pipeline_patch=1,
        patch_mode=False,
        pipeline_patch_idx=0,
        split_text_embed_in_sp=True,
        max_condition_sequence_length=stacks.TEXT,
        backbone_patch_size=2,
        vae_scale_factor=8,
        input_config=SimpleNamespace(width=8 * side, height=8 * side),
        pp_patches_height=[side],
        runtime_config=SimpleNamespace(use_spargeattn_head_balance=False),
        ready=True,
        is_ready=lambda: True,
    )


def _sd3() -> nn.Module:
    """Wrapped around diffusers' model, as its pipeline does."""
    from diffusers import SD3Transformer2DModel
    from xfuser.model_executor.models.transformers.transformer_sd3 import (
        xFuserSD3Transformer2DWrapper,
    )

    return xFuserSD3Transformer2DWrapper(SD3Transformer2DModel(**stacks.SD3))


def _flux() -> nn.Module:
    from xfuser.model_executor.models.transformers.transformer_flux import (
        xFuserFlux1Transformer2DWrapper,
    )

    return xFuserFlux1Transformer2DWrapper(**stacks.FLUX)


def _qwen() -> nn.Module:
    from xfuser.model_executor.models.transformers.transformer_qwen import (
        xFuserQwenImageTransformerWrapper,
    )

    return xFuserQwenImageTransformerWrapper(**stacks.QWEN)


def _wan() -> nn.Module:
    from xfuser.model_executor.models.transformers.transformer_wan import (
        xFuserWanTransformer3DWrapper,
    )

    return xFuserWanTransformer3DWrapper(**stacks.WAN)


def whole(model: nn.Module) -> nn.Module:
    """`_compile_model` of its base runner."""
    return torch.compile(model, mode="default", dynamic=None)


def by_blocks(model: nn.Module) -> None:
    """The same, under FSDP or a cache: each block takes its own place in the list."""
    for name in ("transformer_blocks", "single_transformer_blocks", "blocks"):
        blocks = getattr(model, name, ())
        for i in range(len(blocks)):
            blocks[i] = torch.compile(blocks[i], mode="default", dynamic=None)


if __name__ == "__main__":
    start()
    stacks.main(
        stacks.Stack(
            name="xDiT",
            packages=("xfuser", "diffusers"),
            denoisers=(
                stacks.Denoiser("FLUX", _flux, stacks.flux_inputs()),
                stacks.Denoiser("SD3", _sd3, stacks.sd3_inputs(), 1000.0),
                stacks.Denoiser("Qwen-Image", _qwen, stacks.qwen_inputs()),
                stacks.Denoiser("Wan", _wan, stacks.wan_inputs(), 1000.0),
            ),
            whole=whole,
            by_blocks=by_blocks,
            around=lambda step: nullcontext(),
        )
    )
    torch.distributed.destroy_process_group()
