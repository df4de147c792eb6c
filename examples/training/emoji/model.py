"""The model's size and its initial weights."""

import torch
from diffusers import FluxTransformer2DModel

MODEL = {
    "patch_size": 1,
    "in_channels": 48,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "joint_attention_dim": 384,
    "pooled_projection_dim": 384,
    "guidance_embeds": False,
    "axes_dims_rope": (8, 28, 28),
}
OUTER = ("x_embedder", "proj_out", "norm_out")
"""The layers at the model's ends, by prefix of their names."""


def build_model() -> FluxTransformer2DModel:
    """Return the untrained model; every block starts as the identity."""
    model = FluxTransformer2DModel(**MODEL)
    modulations = ("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear")
    for name, module in model.named_modules():
        if name == "proj_out" or name.endswith(modulations):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return model
