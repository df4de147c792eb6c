"""Text-to-image and class-to-image transformers, each as its pipeline calls it."""

from __future__ import annotations

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    BriaFibo2Transformer2DModel,
    BriaFiboTransformer2DModel,
    BriaTransformer2DModel,
    ChromaTransformer2DModel,
    CogView3PlusTransformer2DModel,
    CogView4Transformer2DModel,
    DiTTransformer2DModel,
    ErnieImageTransformer2DModel,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    PixArtTransformer2DModel,
    PriorTransformer,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina
from torch import Tensor

from tests.models.case import Case, builders


def grid(rows: int, columns: int) -> Tensor:
    """Position ids of a packed latent: (0, row, column) for each token."""
    return torch.cartesian_prod(
        torch.zeros(1), torch.arange(rows) * 1.0, torch.arange(columns) * 1.0
    )


def padded(length: int, dtype: torch.dtype = torch.int64, rest: int = 0) -> Tensor:
    """The mask of two texts, the second one two tokens short; `rest` ones behind it."""
    mask = torch.ones(2, length + rest, dtype=dtype)
    mask[1, length - 2 : length] = 0
    return mask


def dit_transformer(classes: int = 10) -> Case:
    """Square: the forward takes the root of the token count for the height and the width."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=20,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=12,
        patch_size=2,
        num_embeds_ada_norm=classes,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 12, 12),
        "timestep": torch.full((2,), 700),
        "class_labels": torch.tensor([3, 10]),
        "return_dict": False,
    }
    return Case(model, inputs)


def pixart_transformer(sample_size: int = 16) -> Case:
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=36,
        sample_size=sample_size,
        patch_size=2,
        use_additional_conditions=True,
        caption_channels=20,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 12, 14),
        "encoder_hidden_states": torch.randn(2, 5, 20),
        "timestep": torch.full((2,), 700),
        "added_cond_kwargs": {
            "resolution": torch.tensor([[96.0, 112.0]] * 2),
            "aspect_ratio": torch.tensor([[96 / 112]] * 2),
        },
        "encoder_attention_mask": padded(5),
        "return_dict": False,
    }
    return Case(model, inputs)


def hunyuan_dit(layers: int = 6) -> Case:
    """Of six blocks the last two take the outputs of the first two."""
    torch.manual_seed(0)
    model = HunyuanDiT2DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=16,
        hidden_size=48,
        num_layers=layers,
        mlp_ratio=2.0,
        cross_attention_dim=20,
        cross_attention_dim_t5=24,
        pooled_projection_dim=28,
        text_len=5,
        text_len_t5=6,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 12, 14),
        "timestep": torch.full((2,), 700.0),
        "encoder_hidden_states": torch.randn(2, 5, 20),
        "text_embedding_mask": padded(5),
        "encoder_hidden_states_t5": torch.randn(2, 6, 24),
        "text_embedding_mask_t5": padded(6),
        "image_meta_size": torch.tensor([[96.0, 112.0, 96.0, 112.0, 0.0, 0.0]] * 2),
        "style": torch.zeros(2, dtype=torch.int64),
        "image_rotary_emb": get_2d_rotary_pos_embed(16, ((0, 0), (6, 7)), (6, 7), output_type="pt"),
        "return_dict": False,
    }
    return Case(model, inputs)


def aura_flow_transformer() -> Case:
    torch.manual_seed(0)
    model = AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=20,
        caption_projection_dim=48,
        out_channels=4,
        pos_embed_max_size=100,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 12, 14),
        "encoder_hidden_states": torch.randn(2, 5, 20),
        "timestep": torch.full((2,), 0.7),
        "return_dict": False,
    }
    return Case(model, inputs)


def lumina_next_dit() -> Case:
    torch.manual_seed(0)
    model = LuminaNextDiT2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=48,
        num_layers=2,
        num_attention_heads=6,
        num_kv_heads=3,
        multiple_of=16,
        cross_attention_dim=20,
    )
    model.pad_token.data.zero_()  # left empty by the class, and not used
    inputs = {
        "hidden_states": torch.randn(2, 4, 12, 14),
        "timestep": torch.full((2,), 0.3),
        "encoder_hidden_states": torch.randn(2, 5, 20),
        "encoder_mask": padded(5),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(8, 16, 16),
        "cross_attention_kwargs": {"base_sequence_length": 64},
        "return_dict": False,
    }
    return Case(model, inputs)


def lumina2_transformer() -> Case:
    torch.manual_seed(0)
    model = Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=2,
        num_attention_heads=6,
        num_kv_heads=3,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(60, 16, 16),
        cap_feat_dim=20,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 12, 14),
        "timestep": torch.full((2,), 0.3),
        "encoder_hidden_states": torch.randn(2, 5, 20),
        "encoder_attention_mask": padded(5),
        "return_dict": False,
    }
    return Case(model, inputs)


def sana_transformer() -> Case:
    torch.manual_seed(0)
    model = SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=3,
        cross_attention_head_dim=16,
        cross_attention_dim=48,
        caption_channels=20,
        sample_size=8,
        patch_size=1,
    )
    inputs = {
        "hidden_states": torch.randn(2, 8, 6, 7),
        "encoder_hidden_states": torch.randn(2, 5, 20),
        "timestep": torch.full((2,), 700.0),
        "encoder_attention_mask": padded(5),
        "return_dict": False,
    }
    return Case(model, inputs)


def bria_transformer() -> Case:
    torch.manual_seed(0)
    model = BriaTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=20,
        axes_dims_rope=[4, 6, 6],
    )
    inputs = {
        "hidden_states": torch.randn(2, 42, 8),
        "encoder_hidden_states": torch.randn(2, 5, 20),
        "timestep": torch.full((2,), 700.0),
        "img_ids": grid(6, 7),
        "txt_ids": torch.zeros(5, 3),
        "return_dict": False,
    }
    return Case(model, inputs)


def bria_fibo_transformer() -> Case:
    torch.manual_seed(0)
    model = BriaFiboTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=40,
        axes_dims_rope=[4, 6, 6],
        text_encoder_dim=20,
    )
    inputs = {
        "hidden_states": torch.randn(2, 42, 8),
        "encoder_hidden_states": torch.randn(2, 5, 40),
        "text_encoder_layers": [torch.randn(2, 5, 20) for _ in range(4)],
        "timestep": torch.full((2,), 700.0),
        "img_ids": grid(6, 7),
        "txt_ids": torch.zeros(5, 3),
        "joint_attention_kwargs": {
            "attention_mask": padded(5, torch.bool, rest=42)[:, None, None, :]
        },
        "return_dict": False,
    }
    return Case(model, inputs)


def bria_fibo2_transformer() -> Case:
    """Six gist tokens for both texts: for other counts the forward takes another way."""
    torch.manual_seed(0)
    model = BriaFibo2Transformer2DModel(
        in_channels=4,
        patch_size=2,
        dim=48,
        n_layers=4,
        n_refiner_layers=2,
        n_heads=3,
        cap_feat_dim=20,
        injection_layer_ids=(1, 3),
        perceiver_num_layers=2,
        min_num_gist_tokens=3,
        max_num_gist_tokens=9,
        gist_step=6,
        gist_min_text_len=2,
        gist_max_text_len=20,
        axes_dims=(4, 6, 6),
        axes_lens=(24, 16, 16),
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 12, 14),
        "timestep": torch.full((2,), 0.7),
        "encoder_hidden_states": torch.randn(2, 3, 5, 20),
        "encoder_attention_mask": padded(5, torch.bool),
        "return_dict": False,
    }
    return Case(model, inputs)


def chroma_transformer() -> Case:
    """The pipeline's mask is of floats, and is one on the first padded token too."""
    torch.manual_seed(0)
    model = ChromaTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=20,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=24,
        approximator_layers=2,
    )
    inputs = {
        "hidden_states": torch.randn(2, 42, 8),
        "encoder_hidden_states": torch.randn(2, 5, 20),
        "timestep": torch.full((2,), 0.7),
        "img_ids": grid(6, 7),
        "txt_ids": torch.zeros(5, 3),
        "attention_mask": padded(5, torch.float32, rest=42),
        "return_dict": False,
    }
    return Case(model, inputs)


def cogview3_plus_transformer() -> Case:
    torch.manual_seed(0)
    model = CogView3PlusTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        out_channels=4,
        text_embed_dim=20,
        time_embed_dim=24,
        condition_dim=10,
        pos_embed_max_size=8,
        sample_size=16,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 12, 14),
        "encoder_hidden_states": torch.randn(2, 5, 20),
        "timestep": torch.full((2,), 700),
        "original_size": torch.tensor([[96.0, 112.0]] * 2),
        "target_size": torch.tensor([[96.0, 112.0]] * 2),
        "crop_coords": torch.zeros(2, 2),
        "return_dict": False,
    }
    return Case(model, inputs)


def cogview4_transformer() -> Case:
    torch.manual_seed(0)
    model = CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        text_embed_dim=20,
        time_embed_dim=24,
        condition_dim=10,
        sample_size=16,
        rope_axes_dim=(16, 16),
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 12, 14),
        "encoder_hidden_states": torch.randn(2, 5, 20),
        "timestep": torch.full((2,), 700.0),
        "original_size": torch.tensor([[96.0, 112.0]] * 2),
        "target_size": torch.tensor([[96.0, 112.0]] * 2),
        "crop_coords": torch.zeros(2, 2),
        "return_dict": False,
    }
    return Case(model, inputs)


def ernie_image_transformer() -> Case:
    torch.manual_seed(0)
    model = ErnieImageTransformer2DModel(
        hidden_size=48,
        num_attention_heads=3,
        num_layers=2,
        ffn_hidden_size=56,
        in_channels=8,
        out_channels=8,
        patch_size=1,
        text_in_dim=20,
        rope_axes_dim=(4, 6, 6),
    )
    inputs = {
        "hidden_states": torch.randn(2, 8, 6, 7),
        "timestep": torch.full((2,), 700.0),
        "text_bth": torch.randn(2, 5, 20) * padded(5)[:, :, None],
        "text_lens": torch.tensor([5, 3]),
        "return_dict": False,
    }
    return Case(model, inputs)


def flux_guidance() -> Case:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    inputs = {
        "hidden_states": torch.randn(2, 42, 8),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "pooled_projections": torch.randn(2, 20),
        "timestep": torch.full((2,), 0.7),
        "img_ids": grid(6, 7),
        "txt_ids": torch.zeros(5, 3),
        "guidance": torch.full((2,), 3.5),
        "return_dict": False,
    }
    return Case(model, inputs)


def sd3_transformer() -> Case:
    """Three blocks: the last one gives no text."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=24,
        caption_projection_dim=48,
        pooled_projection_dim=20,
        out_channels=4,
        pos_embed_max_size=8,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 12, 14),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "pooled_projections": torch.randn(2, 20),
        "timestep": torch.full((2,), 700.0),
        "return_dict": False,
    }
    return Case(model, inputs)


def prior_transformer() -> Case:
    """The latent is one embedding, the time has no batch dimension."""
    torch.manual_seed(0)
    model = PriorTransformer(
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=2,
        embedding_dim=24,
        num_embeddings=5,
        additional_embeddings=4,
    )
    inputs = {
        "hidden_states": torch.randn(2, 24),
        "timestep": torch.tensor(700),
        "proj_embedding": torch.randn(2, 24),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "attention_mask": padded(5, torch.bool),
        "return_dict": False,
    }
    return Case(model, inputs)


MODELS = builders(
    dit_transformer,
    pixart_transformer,
    hunyuan_dit,
    aura_flow_transformer,
    lumina_next_dit,
    lumina2_transformer,
    sana_transformer,
    bria_transformer,
    bria_fibo_transformer,
    bria_fibo2_transformer,
    chroma_transformer,
    cogview3_plus_transformer,
    cogview4_transformer,
    ernie_image_transformer,
    flux_guidance,
    sd3_transformer,
    prior_transformer,
)
