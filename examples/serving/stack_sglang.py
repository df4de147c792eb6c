"""SGLang's denoisers on a CPU, one rank: its own CPU platform, its own compile functions.

    pip install --no-deps sglang==0.5.23 einops triton orjson pybase64 msgspec pyzmq ipython \
        traitlets addict apache-tvm-ffi dill sentencepiece compressed-tensors loguru gguf cache-dit
    pip install diffusers transformers
    python examples/serving/stack_sglang.py --markdown examples/serving/stacks.md

Its pins (torch 2.14.1 and CUDA packages) are left out. torchvision is replaced by stand-ins: only
what reads pictures calls it. Two fused norms have CPU kernels that no package brings: they run as
the lines of torch that its code has for other devices.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

os.environ["SGLANG_DIFFUSION_PLATFORM_OVERRIDE"] = "cpu"

import stacks
import torch
from diffusers import FluxTransformer2DModel  # before the stand-ins
from torch import Tensor, nn

ONE_RANK = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29711", "RANK": "0", "LOCAL_RANK": "0"}
TORCHVISION = ("", ".transforms", ".transforms.functional", ".transforms.v2")
MORE = (".transforms.v2.functional", ".io", ".utils")


def start() -> None:
    """Its settings for one rank on a CPU, as its workers make them."""
    assert FluxTransformer2DModel
    stacks.absent(*(f"torchvision{part}" for part in (*TORCHVISION, *MORE)))
    os.environ.update(ONE_RANK, WORLD_SIZE="1")
    from sglang.multimodal_gen.runtime import server_args
    from sglang.multimodal_gen.runtime.distributed import parallel_state

    settings = stacks.namespace(
        attention_backend_config=stacks.namespace(),
        component_attention_backends={},
        kv_gather_degree=1,
        ulysses_degree=1,
        ring_degree=1,
        sp_degree=1,
        tp_size=1,
        num_gpus=1,
        comfyui_mode=False,
        disable_autocast=True,
        pipeline_config=stacks.namespace(dit_precision="fp32"),
    )
    server_args.set_global_server_args(settings)
    parallel_state.maybe_init_distributed_environment_and_model_parallel(
        tp_size=1, sp_size=1, ulysses_degree=1
    )


def made(kind: Any, sizes: Any) -> nn.Module:
    """A model whose fused norms are lines of torch."""
    from sglang.multimodal_gen.runtime.layers import layernorm

    model: nn.Module = kind(sizes, hf_config={})
    for module in model.modules():
        if isinstance(module, layernorm._NormScaleShift):
            module._forward_method = partial(_modulated, module.norm)
        elif isinstance(module, layernorm._ScaleResidualNormScaleShift):
            module._forward_method = partial(_added_and_modulated, module.norm)
    return model


def _modulated(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (norm(x) * (1 + scale) + shift).to(x.dtype)


def _added_and_modulated(
    norm: nn.Module, residual: Tensor, x: Tensor, gate: Tensor | int, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    added = residual + x * gate
    return norm(added) * (1 + scale) + shift, added


def _flux() -> nn.Module:
    from sglang.multimodal_gen.configs.models.dits.flux import FluxArchConfig, FluxConfig
    from sglang.multimodal_gen.runtime.models.dits.flux import FluxTransformer2DModel

    return made(FluxTransformer2DModel, FluxConfig(FluxArchConfig(**stacks.FLUX)))


def _sd3() -> nn.Module:
    from sglang.multimodal_gen.configs.models.dits import stablediffusion3 as sizes
    from sglang.multimodal_gen.runtime.models.dits.stablediffusion3 import SD3Transformer2DModel

    sd3 = sizes.StableDiffusion3TransformerArchConfig(**stacks.SD3)
    return made(SD3Transformer2DModel, sizes.StableDiffusion3TransformerConfig(sd3))


def _qwen() -> nn.Module:
    from sglang.multimodal_gen.configs.models.dits.qwenimage import (
        QwenImageArchConfig,
        QwenImageDitConfig,
    )
    from sglang.multimodal_gen.runtime.models.dits.qwen_image import QwenImageTransformer2DModel

    sizes = QwenImageDitConfig(QwenImageArchConfig(**stacks.QWEN))
    return made(QwenImageTransformer2DModel, sizes)


def _wan() -> nn.Module:
    from sglang.multimodal_gen.configs.models.dits.wanvideo import (
        WanVideoArchConfig,
        WanVideoConfig,
    )
    from sglang.multimodal_gen.runtime.models.dits.wanvideo import WanTransformer3DModel

    return made(WanTransformer3DModel, WanVideoConfig(WanVideoArchConfig(**stacks.WAN)))


def flux_inputs() -> dict[str, Any]:
    """Its pipeline makes the rotations before the loop."""
    inputs = stacks.flux_inputs()
    ids = torch.cat([inputs.pop("txt_ids"), inputs.pop("img_ids")])
    del inputs["return_dict"]
    rotations = _flux().rotary_emb(ids)
    return {**inputs, "joint_attention_kwargs": {}, "freqs_cis": rotations}


def qwen_inputs() -> dict[str, Any]:
    """The same."""
    from sglang.multimodal_gen.configs.pipeline_configs.qwen_image import QwenImagePipelineConfig

    inputs = stacks.qwen_inputs()
    picture, text = inputs["img_shapes"], inputs["txt_seq_lens"]
    rotations, complex_ones = QwenImagePipelineConfig.get_freqs_cis(
        picture, text, _qwen().rotary_emb, torch.device("cpu"), torch.float32
    )
    return {**inputs, "freqs_cis": rotations, "freqs_complex": complex_ones}


def without(inputs: dict[str, Any], *names: str) -> dict[str, Any]:
    """Inputs that its forwards do not take left out."""
    return {name: value for name, value in inputs.items() if name not in names}


def whole(model: nn.Module) -> nn.Module:
    """`--enable-torch-compile`."""
    from sglang.multimodal_gen.runtime.utils import torch_compile

    settings = torch_compile.build_torch_compile_kwargs(mode="max-autotune-no-cudagraphs")
    torch_compile.CompiledModuleRegistry().compile_once(model, compile_kwargs=settings)
    return model


def by_blocks(model: nn.Module) -> None:
    """`--regional-compile`."""
    from sglang.multimodal_gen.runtime.utils import torch_compile

    settings = torch_compile.build_torch_compile_kwargs(mode="max-autotune-no-cudagraphs")
    torch_compile.CompiledModuleRegistry().compile_regions_once(model, compile_kwargs=settings)


def around(step: int) -> Any:
    """What its denoising stage enters around each call."""
    from sglang.multimodal_gen.runtime.managers.forward_context import set_forward_context

    return set_forward_context(current_timestep=step, attn_metadata=None, forward_batch=None)


def plugins() -> None:
    """What its workers call before they load a model."""
    from sglang.multimodal_gen.runtime.platforms.plugins import load_plugins

    load_plugins()


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    start()
    stacks.main(
        stacks.Stack(
            name="SGLang",
            packages=("sglang", "diffusers"),
            denoisers=(
                stacks.Denoiser("FLUX", _flux, flux_inputs(), 1000.0),
                stacks.Denoiser("SD3", _sd3, without(stacks.sd3_inputs(), "return_dict"), 1000.0),
                stacks.Denoiser("Qwen-Image", _qwen, qwen_inputs(), 1000.0),
                stacks.Denoiser("Wan", _wan, without(stacks.wan_inputs(), "return_dict"), 1000.0),
            ),
            whole=whole,
            by_blocks=by_blocks,
            around=around,
            plugins=plugins,
        )
    )
    torch.distributed.destroy_process_group()
