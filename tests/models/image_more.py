"""The newer image transformers, small, with what the pipeline of each gives it."""

from __future__ import annotations

import torch
from diffusers import (
    Flux2Transformer2DModel,
    Flux3Transformer2DModel,
    GlmImageTransformer2DModel,
    HiDreamImageTransformer2DModel,
    HunyuanImageTransformer2DModel,
    Ideogram4Transformer2DModel,
    JoyImageEditPlusTransformer3DModel,
    JoyImageEditTransformer3DModel,
    Krea2Transformer2DModel,
    LongCatImageTransformer2DModel,
    NucleusMoEImageTransformer2DModel,
    OmniGenTransformer2DModel,
    OvisImageTransformer2DModel,
    PRXTransformer2DModel,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.models.transformers.transformer_ideogram4 import (
    IMAGE_POSITION_OFFSET,
    LLM_TOKEN_INDICATOR,
    OUTPUT_IMAGE_INDICATOR,
    SEQUENCE_PADDING_INDICATOR,
)
from torch import Tensor, nn

from tests.models.case import Case, builders

TEXT = 5
ROWS, COLUMNS = 6, 7
TOKENS = ROWS * COLUMNS


def image_ids(start: int = 0, modality: int = 0) -> Tensor:
    """(t, h, w) of ROWS x COLUMNS tokens, integers."""
    rows, columns = torch.arange(ROWS) + start, torch.arange(COLUMNS) + start
    return torch.cartesian_prod(torch.tensor([modality]), rows, columns)


def four_axes(ids: Tensor) -> Tensor:
    """(t, h, w, l) with l = 0."""
    return nn.functional.pad(ids, (0, 1))


def text_diagonal() -> Tensor:
    """(0, i, i) of the text tokens."""
    steps = torch.arange(TEXT) * 1.0
    return torch.stack([torch.zeros(TEXT), steps, steps], 1)


def text_last() -> Tensor:
    """(0, 0, 0, i) of the text tokens."""
    return nn.functional.pad(torch.arange(TEXT)[:, None], (3, 0))


def text_mask(missing: int = 2, length: int = TEXT) -> Tensor:
    """Tokenizer's mask: the second sample is `missing` tokens shorter."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, length - missing :] = 0
    return mask


def flux2_transformer() -> Case:
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=20,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )
    inputs = {
        "hidden_states": torch.randn(2, TOKENS, 8),
        "timestep": torch.full((2,), 0.7),
        "guidance": torch.full((2,), 4.0),
        "encoder_hidden_states": torch.randn(2, TEXT, 20),
        "txt_ids": text_last().expand(2, -1, -1),
        "img_ids": four_axes(image_ids()).expand(2, -1, -1),
        "return_dict": False,
    }
    return Case(model, inputs)


def _flux3(flow_map: bool) -> Case:
    torch.manual_seed(0)
    model = Flux3Transformer2DModel(
        in_channels=8,
        cond_in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=20,
        timestep_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        flow_map=flow_map,
    )
    inputs = {
        "hidden_states": torch.randn(2, TOKENS, 8),
        "encoder_hidden_states": torch.randn(2, TEXT, 20),
        "timestep": torch.full((2,), 0.7),
        "img_ids": four_axes(image_ids()) * torch.tensor([1.0, 0.5, 0.5, 1.0]),
        "txt_ids": text_last().float(),
        "return_dict": False,
    }
    return Case(model, inputs)


def flux3_transformer() -> Case:
    return _flux3(flow_map=False)


def flux3_distilled_edit() -> Case:
    """A reference image of 3 x 7 tokens, and the time that the step jumps to."""
    case = _flux3(flow_map=True)
    ids = case.inputs["img_ids"][: 3 * COLUMNS] - torch.tensor([0.0, 0.0, 0.0, 1.0])
    case.inputs |= {
        "image_cond_hidden_states": torch.randn(2, 3 * COLUMNS, 8),
        "image_cond_ids": ids,
        "target_timestep": torch.full((2,), 0.4),
    }
    return case


def glm_image_transformer() -> Case:
    torch.manual_seed(0)
    model = GlmImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        text_embed_dim=20,
        time_embed_dim=28,
        condition_dim=10,
        prior_vq_quantizer_codebook_size=64,
    )
    prior = torch.randint(0, 64, (2, TOKENS))
    inputs = {
        "hidden_states": torch.randn(2, 4, 2 * ROWS, 2 * COLUMNS),
        "encoder_hidden_states": torch.randn(2, TEXT, 20),
        "prior_token_id": prior,
        "prior_token_drop": torch.full_like(prior, False, dtype=torch.bool),
        "timestep": torch.full((2,), 699.0),
        "target_size": torch.tensor([[16.0 * ROWS, 16.0 * COLUMNS]]).repeat(2, 1),
        "crop_coords": torch.zeros(2, 2),
        "return_dict": False,
    }
    return Case(model, inputs)


def hidream_image_transformer() -> Case:
    torch.manual_seed(0)
    model = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=24,
        num_attention_heads=2,
        caption_channels=[20, 28],
        text_emb_dim=18,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(8, 8, 8),
        max_resolution=(14, 16),
        llama_layers=[0, 1, 1, 2],
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 2 * ROWS, 2 * COLUMNS),
        "timesteps": torch.full((2,), 700.0),
        "encoder_hidden_states_t5": torch.randn(2, TEXT, 20),
        "encoder_hidden_states_llama3": torch.randn(3, 2, TEXT, 28),
        "pooled_embeds": torch.randn(2, 18),
        "return_dict": False,
    }
    return Case(model, inputs, time="timesteps")


def hunyuan_image_transformer() -> Case:
    """With the second text, of glyphs; the second prompt has none."""
    torch.manual_seed(0)
    model = HunyuanImageTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        text_embed_dim=20,
        text_embed_2_dim=28,
        rope_axes_dim=(8, 8),
    )
    inputs = {
        "hidden_states": torch.randn(2, 8, ROWS, COLUMNS),
        "timestep": torch.full((2,), 700.0),
        "encoder_hidden_states": torch.randn(2, TEXT, 20),
        "encoder_attention_mask": text_mask(),
        "encoder_hidden_states_2": torch.randn(2, 4, 28),
        "encoder_attention_mask_2": text_mask(missing=4, length=4),
        "return_dict": False,
    }
    return Case(model, inputs)


def hunyuan_image_refiner() -> Case:
    """The second stage: the image to refine beside the latent, one frame, guidance as an input."""
    torch.manual_seed(0)
    model = HunyuanImageTransformer2DModel(
        in_channels=8,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        patch_size=(1, 1, 1),
        guidance_embeds=True,
        text_embed_dim=20,
        rope_axes_dim=(4, 6, 6),
    )
    inputs = {
        "hidden_states": torch.randn(2, 8, 1, ROWS, COLUMNS),
        "timestep": torch.full((2,), 700.0),
        "encoder_hidden_states": torch.randn(2, TEXT, 20),
        "encoder_attention_mask": text_mask(),
        "guidance": torch.full((2,), 3250.0),
        "return_dict": False,
    }
    return Case(model, inputs)


def ideogram4_transformer() -> Case:
    """One packed sequence: text, padded on the left, then image. The pipeline drops the text."""
    torch.manual_seed(0)
    model = Ideogram4Transformer2DModel(
        in_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        intermediate_size=40,
        adaln_dim=28,
        llm_features_dim=20,
        rope_theta=10000,
        mrope_section=(4, 2, 2),
    )
    length = TEXT + TOKENS
    position = torch.zeros(2, length, 3, dtype=torch.long)
    segment = torch.full((2, length), SEQUENCE_PADDING_INDICATOR)
    indicator = torch.zeros(2, length, dtype=torch.long)
    for sample, padding in enumerate((0, 2)):
        position[sample, padding:TEXT] = torch.arange(TEXT - padding)[:, None]
        position[sample, TEXT:] = image_ids() + IMAGE_POSITION_OFFSET
        segment[sample, padding:] = 1
        indicator[sample, padding:TEXT] = LLM_TOKEN_INDICATOR
        indicator[sample, TEXT:] = OUTPUT_IMAGE_INDICATOR
    inputs = {
        "hidden_states": torch.cat([torch.zeros(2, TEXT, 8), torch.randn(2, TOKENS, 8)], 1),
        "timestep": torch.full((2,), 0.3),
        "encoder_hidden_states": torch.cat(
            [torch.randn(2, TEXT, 20), torch.zeros(2, TOKENS, 20)], 1
        ),
        "position_ids": position,
        "segment_ids": segment,
        "indicator": indicator,
        "return_dict": False,
    }
    return Case(model, inputs)


def joy_image_edit_transformer() -> Case:
    """Two items: the reference image and the image that is made."""
    torch.manual_seed(0)
    model = JoyImageEditTransformer3DModel(
        in_channels=4,
        hidden_size=48,
        num_attention_heads=3,
        text_dim=20,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    )
    inputs = {
        "hidden_states": torch.randn(2, 2, 4, 1, 2 * ROWS, 2 * COLUMNS),
        "timestep": torch.full((2,), 700.0),
        "encoder_hidden_states": torch.randn(2, TEXT, 20),
        "return_dict": False,
    }
    return Case(model, inputs)


def joy_image_edit_plus_transformer() -> Case:
    """Patches of the image and of one reference; the second sample's reference is smaller."""
    torch.manual_seed(0)
    model = JoyImageEditPlusTransformer3DModel(
        in_channels=4,
        hidden_size=48,
        num_attention_heads=3,
        text_dim=20,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    )
    target = (1, ROWS, COLUMNS)
    latent = torch.randn(2, TOKENS + 4 * 5, 4, 1, 2, 2)
    latent[1, TOKENS + 3 * 5 :] = 0
    inputs = {
        "hidden_states": latent,
        "timestep": torch.full((2,), 700.0),
        "encoder_hidden_states": torch.randn(2, TEXT, 20),
        "encoder_hidden_states_mask": text_mask(),
        "shape_list": [[target, (1, 4, 5)], [target, (1, 3, 5)]],
        "return_dict": False,
    }
    return Case(model, inputs)


def krea2_transformer() -> Case:
    torch.manual_seed(0)
    model = Krea2Transformer2DModel(
        in_channels=8,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        timestep_embed_dim=32,
        text_hidden_dim=20,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=28,
        axes_dims_rope=(4, 4, 4),
    )
    inputs = {
        "hidden_states": torch.randn(2, TOKENS, 8),
        "encoder_hidden_states": torch.randn(2, TEXT, 3, 20),
        "timestep": torch.full((2,), 0.7),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), image_ids().float()]),
        "encoder_attention_mask": text_mask().bool(),
        "return_dict": False,
    }
    return Case(model, inputs)


def longcat_image_transformer() -> Case:
    torch.manual_seed(0)
    model = LongCatImageTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=20,
        pooled_projection_dim=20,
        axes_dims_rope=[4, 6, 6],
    )
    inputs = {
        "hidden_states": torch.randn(2, TOKENS, 8),
        "timestep": torch.full((2,), 0.7),
        "guidance": None,
        "encoder_hidden_states": torch.randn(2, TEXT, 20),
        "txt_ids": text_diagonal(),
        "img_ids": image_ids(start=TEXT, modality=1).float(),
        "return_dict": False,
    }
    return Case(model, inputs)


def nucleus_moe_image_transformer() -> Case:
    """One dense block and two with experts, whose weights diffusers leaves uninitialized."""
    torch.manual_seed(0)
    model = NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        joint_attention_dim=20,
        axes_dims_rope=(4, 4, 4),
        dense_moe_strategy="leave_first_block_dense",
        num_experts=4,
        moe_intermediate_dim=40,
        capacity_factors=2.0,
    )
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            nn.init.normal_(parameter, std=0.1)
    inputs = {
        "hidden_states": torch.randn(2, TOKENS, 16),
        "timestep": torch.full((2,), 0.7),
        "encoder_hidden_states": torch.randn(2, TEXT, 20),
        "encoder_hidden_states_mask": text_mask(),
        "img_shapes": [(1, ROWS, COLUMNS)] * 2,
        "return_dict": False,
    }
    return Case(model, inputs)


def omnigen_transformer() -> Case:
    """Text to image: no input images. The second prompt is padded on the left."""
    torch.manual_seed(0)
    model = OmniGenTransformer2DModel(
        in_channels=4,
        hidden_size=48,
        num_attention_heads=3,
        num_key_value_heads=3,
        intermediate_size=40,
        num_layers=2,
        pad_token_id=0,
        vocab_size=64,
        max_position_embeddings=256,
        original_max_position_embeddings=128,
        rope_scaling={"short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        pos_embed_max_size=16,
        time_step_dim=32,
    )
    length = TEXT + 1 + TOKENS  # text, time, image
    mask = torch.ones(2, length, length)
    mask[:, : TEXT + 1] = torch.ones(TEXT + 1, length).tril()
    position = torch.arange(length).repeat(2, 1)
    ids = torch.randint(1, 64, (2, TEXT))
    ids[1, :2], position[1] = 0, (position[1] - 2).clamp(min=0)
    mask[1, 2:, :2], mask[1, :2] = 0, 1
    inputs = {
        "hidden_states": torch.randn(2, 4, 2 * ROWS, 2 * COLUMNS),
        "timestep": torch.full((2,), 0.3),
        "input_ids": ids,
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask,
        "position_ids": position,
        "return_dict": False,
    }
    return Case(model, inputs)


def ovis_image_transformer() -> Case:
    torch.manual_seed(0)
    model = OvisImageTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=20,
        axes_dims_rope=(4, 6, 6),
    )
    inputs = {
        "hidden_states": torch.randn(2, TOKENS, 8),
        "timestep": torch.full((2,), 0.7),
        "encoder_hidden_states": torch.randn(2, TEXT, 20),
        "txt_ids": text_diagonal(),
        "img_ids": image_ids().float(),
        "return_dict": False,
    }
    return Case(model, inputs)


def prx_transformer() -> Case:
    torch.manual_seed(0)
    model = PRXTransformer2DModel(
        in_channels=4,
        context_in_dim=20,
        hidden_size=48,
        num_heads=3,
        depth=2,
        axes_dim=[8, 8],
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 2 * ROWS, 2 * COLUMNS),
        "timestep": torch.full((2,), 0.7),
        "encoder_hidden_states": torch.randn(2, TEXT, 20),
        "attention_mask": text_mask().bool(),
        "return_dict": False,
    }
    return Case(model, inputs)


def qwen_image_transformer() -> Case:
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=20,
        axes_dims_rope=(4, 6, 6),
    )
    inputs = {
        "hidden_states": torch.randn(2, TOKENS, 16),
        "timestep": torch.full((2,), 0.7),
        "guidance": None,
        "encoder_hidden_states_mask": text_mask(),
        "encoder_hidden_states": torch.randn(2, TEXT, 20),
        "img_shapes": [[(1, ROWS, COLUMNS)]] * 2,
        "return_dict": False,
    }
    return Case(model, inputs)


def qwen_image21_transformer() -> Case:
    """Without the cache of keys. The output has the text in front; the pipeline drops it."""
    torch.manual_seed(0)
    model = QwenImage21Transformer2DModel(
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        context_in_dim=20,
        axes_dims_rope=(4, 6, 6),
    )
    tokens = 6 * 8
    slots = torch.cat([torch.zeros(2, TEXT), torch.ones(2, tokens // 4)], 1).bool()
    inputs = {
        "hidden_states": torch.randn(2, tokens, 8),
        "timestep": torch.full((2,), 0.7),
        "encoder_hidden_states": torch.randn(2, TEXT, 20),
        "encoder_hidden_states_mask": text_mask(),
        "img_shapes": [[(1, 6, 8)]] * 2,
        "img_mask": slots,
        "return_dict": False,
    }
    return Case(model, inputs)


def z_image_transformer() -> Case:
    """Lists of samples, prompts of two lengths. The model pads the image to 64, prompts to 32."""
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=2,
        n_refiner_layers=2,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=20,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 16, 16],
    )
    inputs = {
        "x": [torch.randn(4, 1, 2 * ROWS, 2 * COLUMNS) for _ in range(2)],
        "t": torch.full((2,), 0.3),
        "cap_feats": [torch.randn(TEXT, 20), torch.randn(TEXT + 2, 20)],
        "return_dict": False,
    }
    return Case(model, inputs, latent="x", time="t")


MODELS = builders(
    flux2_transformer,
    flux3_transformer,
    flux3_distilled_edit,
    glm_image_transformer,
    hidream_image_transformer,
    hunyuan_image_transformer,
    hunyuan_image_refiner,
    ideogram4_transformer,
    joy_image_edit_transformer,
    joy_image_edit_plus_transformer,
    krea2_transformer,
    longcat_image_transformer,
    nucleus_moe_image_transformer,
    omnigen_transformer,
    ovis_image_transformer,
    prx_transformer,
    qwen_image_transformer,
    qwen_image21_transformer,
    z_image_transformer,
)
