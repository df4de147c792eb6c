"""Video transformers, second half of the alphabet: Kandinsky to Wan-Animate, small and random."""

from __future__ import annotations

import torch
from diffusers import (
    Kandinsky5Transformer3DModel,
    Kandinsky6SRTransformer3DModel,
    Kandinsky6Transformer3DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MiniMaxH3Transformer3DModel,
    MochiTransformer3DModel,
    MotifVideoTransformer3DModel,
    SanaVideoTransformer3DModel,
    SanaWMLTX2RefinerTransformer3DModel,
    SanaWMTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    WanAnimate2Transformer3DModel,
    WanAnimateTransformer3DModel,
)
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import Tensor

from tests.models.case import Case, builders


def text_mask(dtype: torch.dtype = torch.bool, length: int = 5, padded: int = 2) -> Tensor:
    """Two prompts, the second one shorter."""
    mask = torch.ones(2, length, dtype=dtype)
    mask[1, length - padded :] = 0
    return mask


def grid(frames: int, rows: int, columns: int) -> Tensor:
    """The (t, h, w) position of every token."""
    axes = (torch.arange(size, dtype=torch.float64) for size in (frames, rows, columns))
    return torch.cartesian_prod(*axes)


def kandinsky5_transformer() -> Case:
    torch.manual_seed(0)
    model = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=24,
        in_text_dim2=20,
        time_dim=40,
        model_dim=48,
        ff_dim=56,
        num_text_blocks=2,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        visual_cond=True,
    )
    inputs = {
        "hidden_states": torch.randn(2, 3, 6, 8, 9),  # latent, condition, mask
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "timestep": torch.full((2,), 700.0),
        "pooled_projections": torch.randn(2, 20),
        "visual_rope_pos": [torch.arange(3), torch.arange(3), torch.arange(4)],
        "text_rope_pos": torch.arange(5),
        "scale_factor": (1.0, 2.0, 2.0),
        "return_dict": False,
    }
    return Case(model, inputs)


def kandinsky6_transformer() -> Case:
    torch.manual_seed(0)
    model = Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=24,
        in_text_dim2=20,
        time_dim=40,
        model_dim=48,
        ff_dim=56,
        num_text_blocks=2,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        in_audio_dim=7,
        out_audio_dim=7,
        model_dim_a=32,
        time_dim_a=28,
        ff_dim_a=44,
        text_token_padding=True,
        ca_rope=True,
        cross_gates=True,
        fix_modulation=True,
    )
    inputs = {
        "hidden_states": torch.randn(2, 3, 6, 8, 9),
        "audio_hidden_states": torch.randn(2, 10, 7),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "pooled_projections": torch.randn(2, 20),
        "timestep": torch.full((2,), 700.0),
        "encoder_attention_mask": text_mask(),
        "return_dict": False,
    }
    return Case(model, inputs, also=("audio_hidden_states",))


def kandinsky6_sr_transformer() -> Case:
    """More tokens than elsewhere: its sparse attention works in blocks of 8 x 8 tokens."""
    torch.manual_seed(0)
    model = Kandinsky6SRTransformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        time_dim=40,
        model_dim=48,
        ff_dim=56,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        nabla_window=(1, 1, 1),
    )
    inputs = {
        "hidden_states": torch.randn(2, 3, 8, 16, 9),
        "timestep": torch.full((2,), 700.0),
        "return_dict": False,
    }
    return Case(model, inputs)


def ltx_video_transformer() -> Case:
    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=3,
        attention_head_dim=16,
        cross_attention_dim=48,
        num_layers=2,
        caption_channels=24,
    )
    inputs = {
        "hidden_states": torch.randn(2, 2 * 6 * 7, 8),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "timestep": torch.full((2,), 700.0),
        "encoder_attention_mask": text_mask(),
        "num_frames": 2,
        "height": 6,
        "width": 7,
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "return_dict": False,
    }
    return Case(model, inputs)


def ltx2_video_transformer() -> Case:
    torch.manual_seed(0)
    model = LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=3,
        attention_head_dim=16,
        cross_attention_dim=48,
        audio_in_channels=7,
        audio_out_channels=7,
        audio_num_attention_heads=3,
        audio_attention_head_dim=12,
        audio_cross_attention_dim=36,
        num_layers=2,
        caption_channels=24,
        rope_type="split",
    )
    inputs = {
        "hidden_states": torch.randn(2, 2 * 6 * 7, 8),
        "audio_hidden_states": torch.randn(2, 10, 7),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "audio_encoder_hidden_states": torch.randn(2, 5, 24),
        "timestep": torch.full((2,), 700.0),
        "sigma": torch.full((2,), 700.0),
        "encoder_attention_mask": text_mask(torch.int64),
        "audio_encoder_attention_mask": text_mask(torch.int64),
        "num_frames": 2,
        "height": 6,
        "width": 7,
        "fps": 24.0,
        "audio_num_frames": 10,
        "video_coords": model.rope.prepare_video_coords(2, 2, 6, 7, torch.device("cpu"), fps=24.0),
        "audio_coords": model.audio_rope.prepare_audio_coords(2, 10, torch.device("cpu")),
        "return_dict": False,
    }
    return Case(model, inputs, also=("audio_hidden_states",))


def minimax_h3_transformer() -> Case:
    """One packed sequence of text, sound and video; `timestep` lists the distinct noise levels."""
    torch.manual_seed(0)
    model = MiniMaxH3Transformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        hidden_size=40,
        num_layers=2,
        num_refiner_layers=2,
        ffn_dim=56,
        in_channels=4,
        audio_in_channels=7,
        text_dim=24,
        freq_dim=32,
        time_embed_hidden_dim=44,
        time_embed_dim=36,
        rope_freq_dim=2,
    )
    text, audio, video = 5, 8, 3 * 3 * 4
    tags = torch.tensor([1] * text + [2] * audio + [0] * video)
    positions = torch.cat([grid(text, 1, 1), grid(audio, 1, 1), grid(3, 3, 4)])
    positions[text:, 0] += text
    inputs = {
        "hidden_states": torch.randn(2, video, 16),
        "audio_hidden_states": torch.randn(2, audio, 7),
        "encoder_hidden_states": torch.randn(2, text, 24),
        "timestep": torch.tensor([0.6, 0.7]),
        "timestep_indices": (tags != 2).long(),
        "token_tags": tags,
        "position_ids": positions,
        "video_indices": torch.arange(text + audio, text + audio + video),
        "audio_indices": torch.arange(text, text + audio),
        "text_indices": torch.arange(text),
        "return_dict": False,
    }
    return Case(model, inputs, also=("audio_hidden_states",))


def mochi_transformer() -> Case:
    torch.manual_seed(0)
    model = MochiTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=40,
        in_channels=4,
        text_embed_dim=24,
        time_embed_dim=32,
        max_sequence_length=5,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 6, 8),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "timestep": torch.full((2,), 700.0),
        "encoder_attention_mask": text_mask(),
        "return_dict": False,
    }
    return Case(model, inputs)


def motif_video_transformer() -> Case:
    torch.manual_seed(0)
    model = MotifVideoTransformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=4,
        num_decoder_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=24,
        rope_axes_dim=(4, 6, 6),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )
    inputs = {
        "hidden_states": torch.randn(2, 9, 3, 6, 8),  # latent, condition, mask
        "timestep": torch.full((2,), 700.0),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "encoder_attention_mask": text_mask(),
        "return_dict": False,
    }
    return Case(model, inputs)


def sana_video_transformer() -> Case:
    torch.manual_seed(0)
    model = SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=12,
        cross_attention_dim=48,
        caption_channels=24,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 6, 8),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "encoder_attention_mask": text_mask(torch.int64),
        "timestep": torch.full((2,), 700.0),
        "return_dict": False,
    }
    return Case(model, inputs)


def sana_wm_transformer() -> Case:
    """Linear and softmax blocks in turn; the first frame is given, so its time is zero."""
    torch.manual_seed(0)
    frames, rows, columns = 3, 4, 5
    model = SanaWMTransformer3DModel(
        in_channels=8,
        num_layers=4,
        hidden_size=48,
        num_attention_heads=3,
        linear_head_dim=16,
        softmax_every_n=2,
        chunk_plucker_channels=12,
        caption_channels=24,
    )
    pose = torch.eye(4).repeat(2, frames, 1, 1)
    pose[..., :3, 3] = 0.2 * torch.arange(frames).view(1, frames, 1)
    lens = torch.tensor([4.0, 4.0, columns / 2, rows / 2]).expand(2, frames, 4)
    inputs = {
        "hidden_states": torch.randn(2, 8, frames, rows, columns),
        "timestep": torch.tensor([0.0, 700.0, 700.0]).repeat(2, 1, 1),
        "encoder_hidden_states": torch.randn(2, 1, 6, 24),
        "mask": text_mask(torch.int64, length=6),
        "data_info": {"img_hw": torch.tensor([[128.0, 160.0]])},
        "camera_conditions": torch.cat([pose.flatten(2), lens], dim=-1),
        "chunk_plucker": torch.randn(2, 12, frames, rows, columns),
        "return_dict": False,
    }
    return Case(model, inputs)


def sana_wm_ltx2_refiner_transformer() -> Case:
    """Frames 2 and 3, which also attend to frame 0 (the sink) and frame 1 (the history)."""
    torch.manual_seed(0)
    layers, rows, columns = 2, 5, 7
    model = SanaWMLTX2RefinerTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=3,
        attention_head_dim=16,
        cross_attention_dim=48,
        audio_in_channels=7,
        audio_out_channels=7,
        audio_num_attention_heads=3,
        audio_attention_head_dim=12,
        audio_cross_attention_dim=36,
        num_layers=layers,
        caption_channels=24,
        rope_type="split",
    )

    def rotary(*frames: int) -> tuple[Tensor, Tensor]:
        return model.build_rotary_emb_for_absolute_positions(
            2, list(frames), rows, columns, torch.device("cpu"), 16.0
        )

    cache = SanaWMRefinerKVCache(layers)
    cache.sink_pe = rotary(0)
    for layer in range(layers):
        sink_key, sink_value, key, value = torch.randn(4, 2, rows * columns, 48)
        cache.get(layer).store_sink(sink_key, sink_value)
        cache.get(layer).store_history(key, value)
    inputs = {
        "hidden_states": torch.randn(2, 2 * rows * columns, 8),
        "encoder_hidden_states": torch.randn(2, 6, 24),
        "timestep": torch.full((2, 2 * rows * columns), 700.0),
        "video_rotary_emb": rotary(2, 3),
        "encoder_attention_mask": text_mask(torch.int64, length=6),
        "kv_cache": cache,
        "kv_cache_mode": "inject",
        "return_dict": False,
    }
    return Case(model, inputs)


def skyreels_v2_transformer() -> Case:
    torch.manual_seed(0)
    model = SkyReelsV2Transformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=32,
        ffn_dim=56,
        num_layers=2,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 6, 8),
        "timestep": torch.full((2,), 700),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "return_dict": False,
    }
    return Case(model, inputs)


def wan_animate_transformer() -> Case:
    """The class splits image from text tokens by a fixed text length of 512."""
    torch.manual_seed(0)
    model = WanAnimateTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=12,
        latent_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=32,
        ffn_dim=56,
        num_layers=4,
        image_dim=20,
        added_kv_proj_dim=48,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=22,
        motion_dim=6,
        motion_encoder_dim=26,
        face_encoder_hidden_dim=28,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    inputs = {
        "hidden_states": torch.randn(2, 12, 3, 6, 8),  # latent, reference, mask
        "timestep": torch.full((2,), 700.0),
        "encoder_hidden_states": torch.randn(2, 512, 24),
        "encoder_hidden_states_image": torch.randn(2, 7, 20),
        "pose_hidden_states": torch.randn(2, 4, 2, 6, 8),
        "face_pixel_values": torch.rand(2, 3, 5, 16, 16) * 2 - 1,
        "return_dict": False,
    }
    return Case(model, inputs)


def wan_animate2_transformer() -> Case:
    """The denoising pass; the reference pass before it would have filled the cache."""
    torch.manual_seed(0)
    layers, frames, rows, columns = 2, 2, 4, 6
    model = WanAnimate2Transformer3DModel(
        text_len=9,
        in_dim=12,
        dim=48,
        ffn_dim=56,
        freq_dim=32,
        text_dim=24,
        out_dim=4,
        num_heads=3,
        num_layers=layers,
    )
    with torch.compiler.set_stance("force_eager"):  # else the first forward compiles its mask
        model.block_masks[frames, rows * columns] = model.create_mask(
            frames, rows * columns, torch.device("cpu")
        )
    cache = WanAnimate2KVCache(layers)
    for layer in range(layers):
        cache.get(layer).store(*torch.randn(2, 2, frames * rows * columns, 3, 16))
    inputs = {
        "hidden_states": [torch.randn(4, frames + 1, 2 * rows, 2 * columns) for _ in range(2)],
        "timestep": torch.full((2,), 700),
        "encoder_hidden_states": [torch.randn(5, 24), torch.randn(7, 24)],
        "condition_latents": [torch.randn(8, frames + 1, 2 * rows, 2 * columns) for _ in range(2)],
        "kv_cache": cache,
        "kv_cache_mode": "cached",
        "seq_len": (frames + 1) * rows * columns,
        "encoder_hidden_states_image": torch.randn(2, 11, 1280),
        "reference_grid_sizes": torch.tensor([[frames, rows, columns]] * 2),
        "origin_len": 5,
        "origin_area": [16 * rows, 16 * columns],
        "return_dict": False,
    }
    return Case(model, inputs)


MODELS = builders(
    kandinsky5_transformer,
    kandinsky6_transformer,
    kandinsky6_sr_transformer,
    ltx_video_transformer,
    ltx2_video_transformer,
    minimax_h3_transformer,
    mochi_transformer,
    motif_video_transformer,
    sana_video_transformer,
    sana_wm_transformer,
    sana_wm_ltx2_refiner_transformer,
    skyreels_v2_transformer,
    wan_animate_transformer,
    wan_animate2_transformer,
)
