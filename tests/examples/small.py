"""Whole diffusers pipelines on small random weights, in a folder: FLUX and Stable Diffusion 3."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

LETTERS = string.ascii_lowercase
WIDTH = 16


def tokenizers() -> tuple[Any, Any]:
    ends = (f"{letter}</w>" for letter in LETTERS)
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *ends]
    clip = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    clip.model_max_length = 12
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -1.0) for c in "▁" + LETTERS)]
    return clip, T5TokenizerFast(vocab=pieces, extra_ids=0)


def clip_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=60, hidden_size=WIDTH, projection_dim=WIDTH, intermediate_size=WIDTH,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=12,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip


def t5() -> T5EncoderModel:
    sizes = {"d_model": 2 * WIDTH, "d_kv": 8, "d_ff": WIDTH, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=32, **sizes))


def autoencoder(channels: int) -> AutoencoderKL:
    blocks = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    return AutoencoderKL(
        **blocks, block_out_channels=[4, 4], latent_channels=channels, norm_num_groups=2,
        shift_factor=0.0, scaling_factor=1.0, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def flux_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    clip, unigram = tokenizers()
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=2 * WIDTH, pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(4),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=clip,
        text_encoder_2=t5(),
        tokenizer_2=unigram,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def sd3_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    clip, unigram = tokenizers()
    transformer = SD3Transformer2DModel(
        sample_size=32, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=2 * WIDTH, caption_projection_dim=32, pooled_projection_dim=2 * WIDTH,
        out_channels=4, pos_embed_max_size=32,
    )  # fmt: skip
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(4),
        text_encoder=CLIPTextModelWithProjection(clip_config()),
        tokenizer=clip,
        text_encoder_2=CLIPTextModelWithProjection(clip_config()),
        tokenizer_2=clip,
        text_encoder_3=t5(),
        tokenizer_3=unigram,
    ).save_pretrained(folder)
    return folder
