"""The audio transformers, small, and one of proteins, with what the pipelines of each give them."""

from __future__ import annotations

import torch
from diffusers import (
    AceStepTransformer1DModel,
    LongCatAudioDiTTransformer,
    MiniMaxMusic3Transformer1DModel,
    RFD4ProteinaTransformer,
    StableAudio3DiTModel,
    StableAudioDiTModel,
    T5FilmDecoder,
)
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.transformers.transformer_rfd4_proteina import CONDITION_KEYS
from torch import Tensor, nn

from tests.models.case import Case, builders

TEXT = 5


def mask(length: int, missing: int = 2) -> Tensor:
    """True where a token counts: the second sample is `missing` tokens shorter."""
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[1, length - missing :] = False
    return valid


def ace_step_transformer() -> Case:
    """An odd length, which the model pads to its patches of 2."""
    torch.manual_seed(0)
    model = AceStepTransformer1DModel(
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        in_channels=24,
        audio_acoustic_hidden_dim=8,
        sliding_window=7,
        encoder_hidden_size=20,
    )
    context = torch.cat([torch.randn(2, 61, 8), torch.ones(2, 61, 8)], -1)
    inputs = {
        "hidden_states": torch.randn(2, 61, 8),
        "timestep": torch.full((2,), 0.7),
        "timestep_r": torch.full((2,), 0.7),
        "encoder_hidden_states": torch.randn(2, TEXT, 20),
        "context_latents": context,
        "return_dict": False,
    }
    return Case(model, inputs)


def stable_audio_dit() -> Case:
    """One time for both samples, as in the pipeline."""
    torch.manual_seed(0)
    model = StableAudioDiTModel(
        in_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        out_channels=8,
        cross_attention_dim=32,
        time_proj_dim=28,
        global_states_input_dim=18,
        cross_attention_input_dim=20,
    )
    inputs = {
        "hidden_states": torch.randn(2, 8, 41),
        "timestep": torch.full((1,), 0.7),
        "encoder_hidden_states": torch.randn(2, TEXT, 20),
        "global_hidden_states": torch.randn(2, 1, 18),
        "rotary_embedding": get_1d_rotary_pos_embed(
            8, 41 + 1, use_real=True, repeat_interleave_real=False
        ),
        "return_dict": False,
    }
    return Case(model, inputs)


def stable_audio3_dit() -> Case:
    """The last token of the text is the duration."""
    torch.manual_seed(0)
    model = StableAudio3DiTModel(
        io_channels=8,
        embed_dim=48,
        depth=2,
        num_heads=3,
        cond_token_dim=20,
        global_cond_dim=20,
        local_add_cond_dim=9,
        timestep_features_dim=28,
        num_memory_tokens=4,
    )
    valid = mask(TEXT + 1)
    valid[:, TEXT] = True
    inputs = {
        "hidden_states": torch.randn(2, 8, 41),
        "timestep": torch.full((2,), 0.7),
        "encoder_hidden_states": torch.randn(2, TEXT + 1, 20),
        "global_hidden_states": torch.randn(2, 20),
        "encoder_attention_mask": valid.long(),
        "return_dict": False,
    }
    return Case(model, inputs)


def stable_audio3_inpaint() -> Case:
    """With what is known of the audio, and the mask of it."""
    case = stable_audio3_dit()
    case.inputs["local_add_cond"] = torch.randn(2, 9, 41)
    return case


def longcat_audio_dit() -> Case:
    """Samples of two lengths. The weights that diffusers starts at zero are opened wider."""
    torch.manual_seed(0)
    model = LongCatAudioDiTTransformer(
        dit_dim=48,
        dit_depth=2,
        dit_heads=3,
        dit_text_dim=20,
        latent_dim=8,
    )
    for linear in (model.adaln_global_mlp.mlp[-1], model.norm_out.linear, model.proj_out):
        nn.init.normal_(linear.weight, std=0.1)
    inputs = {
        "hidden_states": torch.randn(2, 41, 8),
        "encoder_hidden_states": torch.randn(2, TEXT, 20),
        "encoder_attention_mask": mask(TEXT),
        "timestep": torch.full((2,), 0.7),
        "attention_mask": mask(41, missing=6),
        "latent_cond": torch.zeros(2, 41, 8),
        "return_dict": False,
    }
    return Case(model, inputs)


def minimax_music3_transformer() -> Case:
    torch.manual_seed(0)
    model = MiniMaxMusic3Transformer1DModel(
        in_channels=8,
        condition_dim=20,
        num_layers=2,
        num_attention_heads=3,
        attention_head_dim=16,
        ff_inner_dim=40,
        rotary_dim=8,
        fourier_embedding_dim=28,
    )
    inputs = {
        "hidden_states": torch.randn(2, 8, 41),
        "timestep": torch.full((2,), 0.3),
        "encoder_hidden_states": torch.randn(2, 41, 20),
        "return_dict": False,
    }
    return Case(model, inputs)


def t5_film_decoder() -> Case:
    """Conditions are a list of (encoding, mask): notes, then audio so far. Returns a tensor."""
    torch.manual_seed(0)
    model = T5FilmDecoder(
        input_dims=8,
        targets_length=41,
        d_model=48,
        num_layers=2,
        num_heads=3,
        d_kv=16,
        d_ff=40,
    )
    inputs = {
        "encodings_and_masks": [
            (torch.randn(2, TEXT, 48), mask(TEXT)),
            (torch.randn(2, 11, 48), torch.ones(2, 11)),
        ],
        "decoder_input_tokens": torch.randn(2, 41, 8),
        "decoder_noise_time": torch.full((2,), 0.7),
    }
    return Case(model, inputs, latent="decoder_input_tokens", time="decoder_noise_time")


def rfd4_proteina_transformer() -> Case:
    """Backbones of proteins of 26 and 24 tokens; a call runs the trunk's layers three times."""
    torch.manual_seed(0)
    model = RFD4ProteinaTransformer(
        nlayers=4,
        token_dim=48,
        nheads=3,
        dim_cond=20,
        pair_repr_dim=12,
        latent_dim=8,
        token_type_emb_dim=6,
        cath_emb_dim=6,
        t_emb_dim=28,
        seq_sep_dim=10,
        xt_pair_dist_dim=14,
        tri_mult_c=10,
    )
    tokens = 26
    valid = mask(tokens)
    atoms = torch.rand(2, tokens, 37) < 0.5
    marks = ("hbond", "pistack", "pication", "saltbridge", "hydrophobic", "metal_coord")
    places = torch.arange(tokens)
    inputs = {
        "bb_ca": torch.randn(2, tokens, 3),
        "local_latents": torch.randn(2, tokens, 8),
        "bb_ca_time": torch.full((2,), 0.3),
        "local_latents_time": torch.full((2,), 0.2),
        "padding_mask": valid,
        "token_type": torch.zeros(2, tokens, dtype=torch.long),
        "atom37_mask": atoms & valid[..., None],
        "conditioning": {
            "is_in_context_conditioning": torch.zeros(2, tokens, dtype=torch.bool),
            "supports_local_latent": valid,
            "molecule_iid": (places >= 15).long().repeat(2, 1),
            "molecule_entity_id": torch.zeros(2, tokens, dtype=torch.long),
            "token_bond_path_length": (places[:, None] - places).abs().repeat(2, 1, 1),
            CONDITION_KEYS["index_group"]: torch.zeros(2, tokens, dtype=torch.long),
            **{CONDITION_KEYS[m]: torch.randint(0, 4, (2, tokens, 37)) for m in marks},
        },
        "recycle_depth": 3,
        "return_dict": False,
    }
    return Case(model, inputs, latent="bb_ca", time="bb_ca_time", also=("local_latents",))


MODELS = builders(
    ace_step_transformer,
    stable_audio_dit,
    stable_audio3_dit,
    stable_audio3_inpaint,
    longcat_audio_dit,
    minimax_music3_transformer,
    t5_film_decoder,
    rfd4_proteina_transformer,
)
