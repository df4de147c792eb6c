"""Small video transformers, each with the call that its pipeline makes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AllegroTransformer3DModel,
    AnyFlowFARTransformer3DModel,
    AnyFlowTransformer3DModel,
    ChronoEditTransformer3DModel,
    CogVideoXTransformer3DModel,
    ConsisIDTransformer3DModel,
    Cosmos3OmniTransformer,
    CosmosTransformer3DModel,
    EasyAnimateTransformer3DModel,
    HeliosTransformer3DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    LatteTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro

from tests.models.case import Case, builders

# Wan's attention takes the last 512 tokens of the context for text, whatever their number is.
WAN_TEXT = 512
WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 20,
    "freq_dim": 32,
    "ffn_dim": 60,
    "num_layers": 2,
}
"""What the models of Wan's family have in common."""


def padded(length: int, dtype: torch.dtype) -> torch.Tensor:
    """The mask of two texts, of which the second ends two tokens early."""
    mask = torch.ones(2, length, dtype=dtype)
    mask[1, -2:] = 0
    return mask


def cogvideox_transformer() -> Case:
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=20,
        text_embed_dim=24,
        num_layers=2,
        sample_width=8,
        sample_height=6,
        sample_frames=9,
        max_text_seq_length=5,
        use_rotary_positional_embeddings=True,
    )
    inputs = {
        "hidden_states": torch.randn(2, 3, 4, 6, 8),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "timestep": torch.full((2,), 700),
        "image_rotary_emb": get_3d_rotary_pos_embed(16, ((0, 0), (3, 4)), (3, 4), 3),
        "return_dict": False,
    }
    return Case(model, inputs)


def consisid_transformer() -> Case:
    torch.manual_seed(0)
    model = ConsisIDTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=8,
        out_channels=4,
        time_embed_dim=20,
        text_embed_dim=24,
        num_layers=2,
        sample_width=8,
        sample_height=6,
        sample_frames=9,
        max_text_seq_length=5,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_interval=1,
        cross_attn_dim_head=14,
        cross_attn_num_heads=2,
        LFE_id_dim=26,
        LFE_vit_dim=18,
        LFE_depth=4,
        LFE_dim_head=10,
        LFE_num_heads=2,
        LFE_num_id_token=3,
        LFE_num_querie=7,
        LFE_output_dim=32,
        LFE_num_scale=2,
    )
    inputs = {
        "hidden_states": torch.randn(2, 3, 8, 6, 8),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "timestep": torch.full((2,), 700),
        "image_rotary_emb": get_3d_rotary_pos_embed(16, ((0, 0), (3, 4)), (3, 4), 3),
        "id_cond": torch.randn(1, 26),
        "id_vit_hidden": [torch.randn(1, 11, 18), torch.randn(1, 11, 18)],
        "return_dict": False,
    }
    return Case(model, inputs)


def latte_transformer() -> Case:
    """Predicts mean and variance: twice the channels."""
    torch.manual_seed(0)
    model = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=20,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=40,
        attention_bias=True,
        sample_size=12,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=24,
        video_length=3,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 12, 14),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "timestep": torch.full((2,), 700),
        "enable_temporal_attentions": True,
        "return_dict": False,
    }
    return Case(model, inputs)


def allegro_transformer() -> Case:
    torch.manual_seed(0)
    model = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=48,
        sample_height=6,
        sample_width=8,
        sample_frames=3,
        caption_channels=20,
    )
    *freqs, t, h, w = get_3d_rotary_pos_embed_allegro(
        24, ((0, 0), (3, 4)), (3, 4), 3, interpolation_scale=(2.2, 2.0, 2.0)
    )
    grid = torch.cartesian_prod(t.long(), h.long(), w.long()).T.reshape(3, 1, -1).contiguous()
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 6, 8),
        "encoder_hidden_states": torch.randn(2, 5, 20),
        "encoder_attention_mask": padded(5, torch.int64),
        "timestep": torch.full((2,), 700),
        "image_rotary_emb": (tuple(freqs), tuple(grid)),
        "return_dict": False,
    }
    return Case(model, inputs)


def any_flow_transformer() -> Case:
    """Frames before channels, and a time for each frame."""
    torch.manual_seed(0)
    model = AnyFlowTransformer3DModel(
        **WAN,
        rope_max_seq_len=16,
    )
    inputs = {
        "hidden_states": torch.randn(2, 3, 4, 6, 8),
        "timestep": torch.full((2, 3), 700.0),
        "r_timestep": torch.full((2, 3), 500.0),
        "encoder_hidden_states": torch.randn(2, 5, 20),
        "return_dict": False,
    }
    return Case(model, inputs)


def any_flow_far_transformer() -> Case:
    """The third chunk of a video: one chunk before it in the cache as it is, one compressed."""
    torch.manual_seed(0)
    model = AnyFlowFARTransformer3DModel(
        full_chunk_limit=2,
        **WAN,
        rope_max_seq_len=16,
        chunk_partition=(1, 1, 2),
    )
    cache = {
        layer: {
            "full_cache": torch.randn(2, 2, 2, 4 * 24, 24),
            "compressed_cache": torch.randn(2, 2, 2, 4 * 6, 24),
        }
        for layer in range(2)
    }
    inputs = {
        "hidden_states": torch.randn(2, 2, 4, 8, 12),
        "timestep": torch.full((2, 2), 700.0),
        "r_timestep": torch.full((2, 2), 500.0),
        "encoder_hidden_states": torch.randn(2, 5, 20),
        "chunk_partition": [1, 1, 2],
        "kv_cache": cache,
        "kv_cache_flag": {"num_cached_chunks": 2, "is_cache_step": False},
        "return_dict": False,
    }
    return Case(model, inputs)


def chrono_edit_transformer() -> Case:
    """Two frames: the first and the last, which the model puts at a distance."""
    torch.manual_seed(0)
    model = ChronoEditTransformer3DModel(
        **WAN | {"in_channels": 12},
        image_dim=18,
        added_kv_proj_dim=48,
        rope_max_seq_len=16,
    )
    inputs = {
        "hidden_states": torch.randn(2, 12, 2, 10, 8),
        "timestep": torch.full((2,), 700.0),
        "encoder_hidden_states": torch.randn(2, WAN_TEXT, 20),
        "encoder_hidden_states_image": torch.randn(2, 7, 18),
        "return_dict": False,
    }
    return Case(model, inputs)


def cosmos_transformer() -> Case:
    """Text to world, with learned positions. A concatenated padding mask would need torchvision."""
    torch.manual_seed(0)
    model = CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=20,
        adaln_lora_dim=14,
        max_size=(8, 16, 16),
        concat_padding_mask=False,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 6, 8),
        "timestep": torch.full((2,), 0.7),
        "encoder_hidden_states": torch.randn(2, 5, 20),
        "fps": 30,
        "padding_mask": torch.zeros(1, 1, 48, 64),
        "return_dict": False,
    }
    return Case(model, inputs)


def cosmos_video_to_world() -> Case:
    """A frame is given: a time for each frame, a mask of the given ones."""
    torch.manual_seed(0)
    model = CosmosTransformer3DModel(
        in_channels=5,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=20,
        adaln_lora_dim=14,
        max_size=(8, 16, 16),
        rope_scale=(1.0, 3.0, 3.0),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=26,
        encoder_hidden_states_channels=20,
    )
    given = torch.tensor([1.0, 0.0, 0.0]).view(1, 1, 3, 1, 1).expand(2, 1, 3, 1, 1)
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 6, 8),
        "timestep": 0.1 * given + 0.7 * (1 - given),
        "encoder_hidden_states": torch.randn(2, 5, 26),
        "fps": 16,
        "condition_mask": given.expand(2, 1, 3, 6, 8).contiguous(),
        "padding_mask": torch.zeros(1, 1, 48, 64),
        "return_dict": False,
    }
    return Case(model, inputs)


def cosmos3_omni_transformer() -> Case:
    """One sequence of text and then video: a list of one video, and a time for each token of it."""
    torch.manual_seed(0)
    model = Cosmos3OmniTransformer(
        head_dim=24,
        hidden_size=40,
        intermediate_size=60,
        latent_channel=4,
        num_attention_heads=4,
        num_hidden_layers=2,
        num_key_value_heads=2,
        patch_latent_dim=16,
        vocab_size=30,
        rope_axes_dim=(4, 4, 4),
    )
    text, (frames, rows, columns) = 5, (3, 3, 4)
    video = torch.arange(frames * rows * columns)
    words = torch.arange(text)
    grid = torch.cartesian_prod(
        torch.arange(frames) + text + 15000.0, torch.arange(rows) * 1.0, torch.arange(columns) * 1.0
    )
    inputs = {
        "input_ids": torch.tensor([3, 14, 15, 9, 2]),
        "text_indexes": words,
        "position_ids": torch.cat([words.float().expand(3, text), grid.T], dim=1),
        "und_len": text,
        "sequence_length": text + len(video),
        "vision_tokens": [torch.randn(1, 4, 3, 6, 8)],
        "vision_token_shapes": [(frames, rows, columns)],
        "vision_sequence_indexes": text + video,
        "vision_mse_loss_indexes": text + video,
        "vision_timesteps": torch.full((len(video),), 700.0),
        "vision_noisy_frame_indexes": [torch.arange(frames)],
        "return_dict": False,
    }
    return Case(model, inputs, latent="vision_tokens", time="vision_timesteps")


def easy_animate_transformer() -> Case:
    """Two blocks with weights of their own for text, and two that share them."""
    torch.manual_seed(0)
    model = EasyAnimateTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        num_layers=4,
        mmdit_layers=2,
        time_embed_dim=20,
        add_norm_text_encoder=True,
        text_embed_dim=24,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 6, 8),
        "timestep": torch.full((2,), 700.0),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "return_dict": False,
    }
    return Case(model, inputs)


def helios_transformer() -> Case:
    """A chunk of three frames, with history at three scales."""
    torch.manual_seed(0)
    model = HeliosTransformer3DModel(
        **WAN,
        rope_dim=(8, 8, 8),
    )
    prefix, long, mid, last, current = torch.arange(11).unsqueeze(0).split([1, 4, 2, 1, 3], dim=1)
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 6, 8),
        "timestep": torch.full((2,), 700.0),
        "encoder_hidden_states": torch.randn(2, 5, 20),
        "indices_hidden_states": current,
        "indices_latents_history_short": torch.cat([prefix, last], dim=1),
        "indices_latents_history_mid": mid,
        "indices_latents_history_long": long,
        "latents_history_short": torch.randn(2, 4, 2, 6, 8),
        "latents_history_mid": torch.randn(2, 4, 2, 6, 8),
        "latents_history_long": torch.randn(2, 4, 4, 6, 8),
        "return_dict": False,
    }
    return Case(model, inputs)


def hunyuan_video_transformer(image_condition_type: str | None = None) -> Case:
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        text_embed_dim=24,
        pooled_projection_dim=20,
        rope_axes_dim=(4, 6, 6),
        image_condition_type=image_condition_type,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 6, 8),
        "timestep": torch.full((2,), 700.0),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "encoder_attention_mask": padded(5, torch.float32),
        "pooled_projections": torch.randn(2, 20),
        "guidance": torch.full((2,), 6000.0),
        "return_dict": False,
    }
    return Case(model, inputs)


def hunyuan_video_token_replace() -> Case:
    """Image to video: blocks of another kind, where the first frame has a time of its own."""
    return hunyuan_video_transformer("token_replace")


def hunyuan_video15_transformer() -> Case:
    """Text to video: the image and its mask are there, and zero."""
    torch.manual_seed(0)
    model = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=2,
        text_embed_dim=24,
        text_embed_2_dim=20,
        image_embed_dim=18,
        rope_axes_dim=(4, 6, 6),
        task_type="t2v",
    )
    inputs = {
        "hidden_states": torch.cat([torch.randn(2, 4, 2, 6, 7), torch.zeros(2, 5, 2, 6, 7)], dim=1),
        "timestep": torch.full((2,), 700.0),
        "encoder_hidden_states": torch.randn(2, 6, 24),
        "encoder_attention_mask": padded(6, torch.float32),
        "encoder_hidden_states_2": torch.randn(2, 5, 20),
        "encoder_attention_mask_2": padded(5, torch.float32),
        "image_embeds": torch.zeros(2, 3, 18),
        "return_dict": False,
    }
    return Case(model, inputs)


def hunyuan_video_framepack_transformer() -> Case:
    """A window of three frames, with history at three scales."""
    torch.manual_seed(0)
    model = HunyuanVideoFramepackTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        text_embed_dim=24,
        pooled_projection_dim=20,
        rope_axes_dim=(4, 6, 6),
        has_image_proj=True,
        image_proj_dim=18,
        has_clean_x_embedder=True,
    )
    prefix, current, last, twice, four = torch.arange(11).split([1, 3, 1, 2, 4])
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 6, 8),
        "timestep": torch.full((2,), 700.0),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "encoder_attention_mask": padded(5, torch.float32),
        "pooled_projections": torch.randn(2, 20),
        "image_embeds": torch.randn(2, 7, 18),
        "indices_latents": current,
        "guidance": torch.full((2,), 6000.0),
        "latents_clean": torch.randn(2, 4, 2, 6, 8),
        "indices_latents_clean": torch.cat([prefix, last]),
        "latents_history_2x": torch.randn(2, 4, 2, 6, 8),
        "indices_latents_history_2x": twice,
        "latents_history_4x": torch.randn(2, 4, 4, 6, 8),
        "indices_latents_history_4x": four,
        "return_dict": False,
    }
    return Case(model, inputs)


def wan_transformer() -> Case:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        **WAN,
        rope_max_seq_len=16,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 6, 8),
        "timestep": torch.full((2,), 700.0),
        "encoder_hidden_states": torch.randn(2, 5, 20),
        "return_dict": False,
    }
    return Case(model, inputs)


def wan_image_to_video() -> Case:
    """The latent with the channels of mask and image after it."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        **WAN | {"in_channels": 12},
        image_dim=18,
        added_kv_proj_dim=48,
        rope_max_seq_len=16,
    )
    inputs = {
        "hidden_states": torch.randn(2, 12, 3, 6, 8),
        "timestep": torch.full((2,), 700.0),
        "encoder_hidden_states": torch.randn(2, WAN_TEXT, 20),
        "encoder_hidden_states_image": torch.randn(2, 7, 18),
        "return_dict": False,
    }
    return Case(model, inputs)


def wan_vace_transformer() -> Case:
    torch.manual_seed(0)
    model = WanVACETransformer3DModel(
        **WAN | {"num_layers": 3},
        rope_max_seq_len=16,
        vace_layers=[0, 2],
        vace_in_channels=10,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 6, 8),
        "timestep": torch.full((2,), 700.0),
        "encoder_hidden_states": torch.randn(2, 5, 20),
        "control_hidden_states": torch.randn(2, 10, 3, 6, 8),
        "control_hidden_states_scale": torch.tensor([1.0, 0.8]),
        "return_dict": False,
    }
    return Case(model, inputs)


MODELS = builders(
    cogvideox_transformer,
    consisid_transformer,
    latte_transformer,
    allegro_transformer,
    any_flow_transformer,
    any_flow_far_transformer,
    chrono_edit_transformer,
    cosmos_transformer,
    cosmos_video_to_world,
    cosmos3_omni_transformer,
    easy_animate_transformer,
    helios_transformer,
    hunyuan_video_transformer,
    hunyuan_video_token_replace,
    hunyuan_video15_transformer,
    hunyuan_video_framepack_transformer,
    wan_transformer,
    wan_image_to_video,
    wan_vace_transformer,
)
