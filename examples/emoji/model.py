"""The model's size, its initial weights and its optimizers."""

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
MUON_RATE = 3e-3
ADAMW_RATE = 1e-3


def build_model() -> FluxTransformer2DModel:
    """Return the untrained model; every block starts as the identity."""
    model = FluxTransformer2DModel(**MODEL)
    modulations = ("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear")
    for name, module in model.named_modules():
        if name == "proj_out" or name.endswith(modulations):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return model


def build_optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the inner matrices, AdamW for the input and output layers and all vectors."""
    outer = ("x_embedder", "proj_out", "norm_out")
    hidden, rest = [], []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and not name.startswith(outer)
        (hidden if inner else rest).append(parameter)
    return [
        torch.optim.Muon(hidden, lr=MUON_RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=ADAMW_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
