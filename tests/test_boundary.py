"""Latent, time and prediction, found from the shapes and names of one call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdiff.boundary import Leaf, step_signature
from specdiff.errors import Unsupported
from specdiff.program import Signature, time_rank


def signature(inputs: list[Leaf], *outputs: Tensor | None) -> Signature:
    return step_signature(inputs, outputs, None, "")


def of(name: str, *shape: int, in_list: bool = False) -> Leaf:
    return Leaf(name, torch.zeros(shape), in_list=in_list)


TIME = of("timestep", 2)


def latents(found: Signature) -> list[str]:
    return [found.inputs[pair.latent].name for pair in found.denoised]


def test_the_usual_name_is_the_latent_among_inputs_of_its_shape():
    found = signature([of("control", 2, 4, 8), TIME, of("x", 2, 4, 8)], torch.zeros(2, 4, 8))
    assert latents(found) == ["x"] and found.batch == 2 and found.additive


def test_the_surest_name_is_the_time():
    names = ["timestep_r", "r_timestep", "guidance", "sigma", "t"]
    found = signature([*(of(n, 2) for n in names), of("x", 2, 4)], torch.zeros(2, 4))
    assert found.time == names.index("t")


@pytest.mark.parametrize("name", ["timestep", "t", "sigmas", "vision_timesteps", "noise_time"])
def test_names_of_a_time(name):
    assert time_rank(name, None) is not None


@pytest.mark.parametrize("name", ["timestep_r", "pos_t", "timer", "noise_level", ""])
def test_names_of_no_time(name):
    assert time_rank(name, None) is None


def test_a_time_named_by_the_option():
    assert time_rank("timestep", "noise_level") is None
    assert time_rank("noise_level", "noise_level") == 0


def test_outputs_that_move_nothing():
    found = signature([of("x", 2, 4, 8), TIME], None, torch.zeros(2, 9), torch.zeros(2, 4, 8))
    assert [pair.velocity for pair in found.denoised] == [2]


def test_caches_are_no_latents():
    inputs = [of("x", 2, 4, 8), TIME, of("kv_cache", 2, 6, 8)]
    found = signature(inputs, torch.zeros(2, 4, 8), torch.zeros(2, 6, 8))
    assert latents(found) == ["x"]


@pytest.mark.parametrize("text", [1, 5])
def test_text_in_front(text):
    output = torch.arange(2.0 * (text + 4) * 8).reshape(2, -1, 8)
    found = signature([of("text", 2, text, 8), of("hidden_states", 2, 4, 8), TIME], output)
    assert latents(found) == ["hidden_states"] and not found.additive
    (moved,) = found.moved_by([output])
    assert torch.equal(moved, output[:, text:])


def test_a_list_of_latents_is_a_batch():
    inputs = [of("x", 4, 1, 8, in_list=True), of("x", 4, 1, 8, in_list=True), of("t", 2)]
    found = signature(inputs, torch.zeros(4, 1, 8), torch.ones(4, 1, 8))
    assert found.batch == 2 and found.tokens.shape == (2, 1, 32)
    (moved,) = found.moved_by([torch.zeros(4, 1, 8), torch.ones(4, 1, 8)])
    assert moved.shape == (2, 4, 1, 8) and moved[1].eq(1).all()


@pytest.mark.parametrize("shapes", [[(4, 1, 8)], [(4, 1, 8), (4, 1, 6)]])
def test_lists_that_are_no_batch(shapes):
    """One sample, or some of several sizes: their first axis holds channels."""
    inputs = [*(of("x", *shape, in_list=True) for shape in shapes), of("t", 1)]
    found = signature(inputs, *(torch.zeros(shape) for shape in shapes))
    assert found.batch == 1 and not found.samples_apart


def test_picture_and_sound():
    inputs = [of("hidden_states", 2, 4, 8), of("audio_hidden_states", 2, 6, 3), TIME]
    found = signature(inputs, torch.zeros(2, 4, 8), torch.zeros(2, 6, 3))
    assert latents(found) == ["hidden_states", "audio_hidden_states"]
    assert found.tokens.shape == (2, 1, 4 * 8 + 6 * 3)


def test_no_boundary():
    with pytest.raises(Unsupported, match="timestep_arg"):
        signature([of("x", 2, 4)], torch.zeros(2, 4))
    with pytest.raises(Unsupported, match="has the shape of an output"):
        signature([of("x", 2, 4, 8), TIME], torch.zeros(2, 5, 9))
