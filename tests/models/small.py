"""FLUX and SD3 in any size, for the tests that vary them. Non-square latents throughout."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn

from tests.models.case import Inputs, randomize


def flux(
    layers: int = 1,
    single_layers: int = 1,
    rows: int = 6,
    columns: int = 7,
    text: int = 4,
    batch: int = 2,
    **config: Any,
) -> tuple[nn.Module, Inputs]:
    """FLUX: rows * columns image tokens, `text` text tokens."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=False,
        axes_dims_rope=(4, 6, 6),
        **config,
    )
    grid = torch.cartesian_prod(
        torch.zeros(1), torch.arange(rows) * 1.0, torch.arange(columns) * 1.0
    )
    inputs = {
        "hidden_states": torch.randn(batch, rows * columns, 8),
        "encoder_hidden_states": torch.randn(batch, text, 24),
        "pooled_projections": torch.randn(batch, 20),
        "timestep": torch.full((batch,), 0.7),
        "img_ids": grid,
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }
    return randomize(model), inputs


def sd3(
    qk_norm: str | None = None,
    dual: tuple[int, ...] = (),
    layers: int = 2,
    height: int = 12,
    width: int = 16,
    text: int = 5,
    batch: int = 2,
) -> tuple[nn.Module, Inputs]:
    """SD3 (qk_norm None) and SD3.5 (qk_norm "rms_norm", dual attention layers)."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=dual,
        qk_norm=qk_norm,
    )
    inputs = {
        "hidden_states": torch.randn(batch, 4, height, width),
        "encoder_hidden_states": torch.randn(batch, text, 24),
        "pooled_projections": torch.randn(batch, 20),
        "timestep": torch.full((batch,), 700.0),
        "return_dict": False,
    }
    return randomize(model), inputs


def changed(inputs: Inputs, by: float = 0.3) -> Inputs:
    """The same call one step later: another latent, another time."""
    torch.manual_seed(2)
    latent: Tensor = inputs["hidden_states"]
    return {
        **inputs,
        "hidden_states": latent + by * torch.randn_like(latent),
        "timestep": inputs["timestep"] * 0.9,
    }


MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "flux": (flux, {}),
    "flux, one sample": (flux, {"batch": 1}),
    "flux, two layers each": (flux, {"layers": 2, "single_layers": 2, "batch": 3}),
    "sd3": (sd3, {}),
    "sd3, one sample": (sd3, {"batch": 1}),
    "sd3.5": (sd3, {"qk_norm": "rms_norm", "dual": (0, 1)}),
    "sd3.5, one sample": (sd3, {"qk_norm": "rms_norm", "dual": (0,), "batch": 1}),
}
