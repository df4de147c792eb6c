"""`specdiff.attach`: a model compiled block by block does what the whole graph does."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import specdiff
from specdiff.plan import Plan
from specdiff.runtime.blocks.patchify import Patches, possible
from tests.models import ZOO, Inputs, flux, sd3

EXACT = {"rtol": 1e-5, "atol": 1e-5}
EAGER = {"inner_backend": "eager"}
SAMPLED = {**EAGER, "ablation": {"importance_queries": 8}}
"""Of 47 attention rows, so that it matters which."""
TAPERED = Plan.tapered(4)
SELECTING = {"plan": TAPERED, "cache_ratio": 0.7}
SETTINGS: dict[str, dict[str, Any]] = {
    "history": SELECTING,
    "paper": {"method": "paper", "cache_ratio": 0.7},
    "whole steps": {"plan": TAPERED},
    "mixed": {"plan": Plan((0, 1, 0, 0.5, 1, 0, 1, 0.5))},
    "budget": {**SELECTING, "max_cache_bytes": 10},
}
MODELS = {
    "flux": partial(flux, layers=2, single_layers=2),
    "sd3": partial(sd3, layers=2),
    "sd3.5": lambda: sd3(qk_norm="rms_norm", dual=(0,), layers=3),
}


def blocks(model: nn.Module) -> list[nn.Module]:
    names = model._repeated_blocks or ["JointTransformerBlock"]
    return [module for module in model.modules() if type(module).__name__ in names]


def compile_blocks(model: nn.Module, options: Any = EAGER, **kwargs: Any) -> nn.Module:
    for block in blocks(model):
        block.compile(backend="specdiff", fullgraph=True, options=options, **kwargs)
    return model


@torch.no_grad()
def generation(model: nn.Module, inputs: Inputs, steps: int = 8) -> list[Tensor]:
    """Euler on a flow, the model's outputs."""
    latent, outputs = inputs["hidden_states"], []
    unit = 1000 if inputs["timestep"].max() > 1.5 else 1
    sigmas = torch.linspace(1, 0, steps + 1)
    for now, then in pairwise(sigmas):
        time = torch.full_like(inputs["timestep"], float(now) * unit)
        velocity = model(**{**inputs, "hidden_states": latent, "timestep": time})[0]
        outputs.append(velocity)
        latent = latent + (then - now) * velocity
    return outputs


def evaluations(model: nn.Module) -> tuple[int, int, int, int]:
    found = specdiff.stats(model)
    return found.dense, found.selective, found.skipped, found.speculative


QUICK = [("flux", "paper"), ("sd3", "history")]
EVERY = [(name, settings) for name in MODELS for settings in SETTINGS]


@pytest.mark.parametrize(
    ("name", "settings"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in EVERY],
)
def test_blocks_do_what_the_whole_graph_does(name, settings):
    """Importance, too, is taken from the same sample of rows: another in each attention."""
    model, inputs = MODELS[name]()
    whole = torch.compile(
        copy.deepcopy(model),
        backend=specdiff.backend(**SAMPLED, **SETTINGS[settings]),
        fullgraph=True,
        dynamic=False,
    )
    expected = generation(whole, inputs)
    compile_blocks(model, dynamic=False, options=SAMPLED)
    specdiff.attach(model, **SETTINGS[settings])
    torch.testing.assert_close(generation(model, inputs), expected, **EXACT)
    assert evaluations(model) == evaluations(whole)
    assert specdiff.stats(model).fallbacks == specdiff.stats(whole).fallbacks


def test_compile_repeated_blocks_of_diffusers():
    model, inputs = MODELS["flux"]()
    exact = generation(model, inputs)
    model.compile_repeated_blocks(backend="specdiff", fullgraph=True, options=EAGER)
    attachment = specdiff.attach(model, plan=TAPERED, cache_ratio=0.0)
    torch.testing.assert_close(generation(model, inputs), exact, **EXACT)
    specdiff.reset(model)
    specdiff.configure(model, cache_ratio=0.5)
    generation(model, inputs)
    assert evaluations(model)[1] > 0
    assert attachment.reasons() == ()


def test_switched_off_it_is_the_model():
    model, inputs = MODELS["sd3"]()
    exact = generation(model, inputs)
    specdiff.attach(compile_blocks(model), **SELECTING)
    with specdiff.session(model, quality="dense"):
        found = generation(model, inputs)
    assert torch.equal(torch.stack(found), torch.stack(exact))
    assert evaluations(model) == (8, 0, 0, 0)
    generation(model, inputs)
    assert evaluations(model)[1] > 0


def test_detached_it_is_dense():
    model, inputs = MODELS["sd3"]()
    exact = generation(model, inputs)
    attachment = specdiff.attach(compile_blocks(model), **SELECTING)
    generation(model, inputs)
    assert evaluations(model)[1] > 0
    attachment.detach()
    torch.testing.assert_close(generation(model, inputs), exact, **EXACT)
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_blocks_of_a_class_share_a_graph_but_no_caches():
    model, inputs = flux(layers=4, single_layers=4)
    specdiff.attach(compile_blocks(model, dynamic=False), **SELECTING)
    torch._dynamo.utils.counters.clear()
    generation(model, inputs)
    # by class, and by the strides of what the block before returns
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    keys_and_values = 8 * 2 * (2 * (6 * 7 + 4) * 32) * 4
    assert specdiff.stats(model).cache_bytes >= keys_and_values


@pytest.mark.slow
def test_two_resolutions_and_two_prompts_in_turns():
    model, inputs = MODELS["flux"]()
    _, other = flux(rows=5, columns=4, text=6)
    alone = [generation(attached(copy.deepcopy(model)), call) for call in (inputs, other)]
    both = attached(model)
    torch.testing.assert_close([generation(both, call) for call in (inputs, other)], alone, **EXACT)


def attached(model: nn.Module) -> nn.Module:
    specdiff.attach(compile_blocks(model), **SELECTING)
    return model


def test_session_gives_the_times():
    model, inputs = MODELS["flux"]()
    specdiff.attach(compile_blocks(model), **SELECTING)
    expected = generation(model, inputs)
    with specdiff.session(model, timesteps=torch.linspace(1, 0, 9)[:-1]):
        found = generation(model, inputs)
    # speculation lands elsewhere: by the list's places, not by equal steps in time
    torch.testing.assert_close(found[:4], expected[:4], **EXACT)


def test_an_output_that_is_no_list_of_tokens_is_dense():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = compile_blocks(MODELS["flux"]()[0])

        def forward(self, **inputs):
            return (self.inner(**inputs)[0].mean((1, 2)),)

    inputs = flux()[1]
    model = Pooled()
    attachment = specdiff.attach(model, **SELECTING)
    with torch.no_grad():
        expected = model.inner(**inputs)[0].mean((1, 2))
        torch.testing.assert_close(model(**inputs)[0], expected, **EXACT)
    assert "no input has the shape of an output" in attachment.reasons()[0]


def test_a_prompt_as_long_as_the_picture_in_larger_patches():
    """12 tokens of text; 12 x 16 positions are 12 patches of 4 x 4, and the model's 48 of 2 x 2."""
    model, inputs = MODELS["sd3"]()
    inputs["encoder_hidden_states"] = torch.randn(2, 12, 24)
    whole = torch.compile(copy.deepcopy(model), backend=specdiff.backend(**EAGER, **SELECTING))
    expected = generation(whole, inputs)
    attachment = specdiff.attach(compile_blocks(model), **SELECTING)
    torch.testing.assert_close(generation(model, inputs), expected, **EXACT)
    assert evaluations(model)[1] > 0
    assert attachment.reasons() == ()


@pytest.mark.parametrize(
    ("make", "text"),
    [(MODELS["sd3"], 48), pytest.param(MODELS["flux"], 42, marks=pytest.mark.slow)],
)
def test_as_many_tokens_of_text_as_of_the_picture(make, text):
    """Blocks do not tell which are which; the name of their argument does."""
    model, inputs = make(text=text)
    whole = torch.compile(copy.deepcopy(model), backend=specdiff.backend(**EAGER, **SELECTING))
    expected = generation(whole, inputs)
    attachment = specdiff.attach(compile_blocks(model), **SELECTING)
    generation(model, inputs, steps=1)
    said = f"2 segments of a block have {text} tokens, not one; name the argument of the blocks"
    assert said in attachment.reasons()[0]
    attachment = specdiff.attach(model, tokens="hidden_state", **SELECTING)
    generation(model, inputs, steps=1)
    assert "['encoder_hidden_states', 'hidden_states'] do" in attachment.reasons()[0]
    attachment = specdiff.attach(model, tokens="hidden_states", **SELECTING)
    torch.testing.assert_close(generation(model, inputs), expected, **EXACT)
    assert evaluations(model)[1] > 0
    assert attachment.reasons() == ()


class WithNone(nn.Module):
    """As xDiT's wrappers return it: the prediction and None in a tuple of their own."""

    def __init__(self):
        super().__init__()
        self.inner = compile_blocks(MODELS["sd3"]()[0])

    def forward(self, **inputs):
        return ((self.inner(**inputs)[0], None),)


def test_an_output_with_none_beside_it():
    inputs = sd3(layers=2)[1]
    model = WithNone()
    specdiff.attach(model, **SELECTING)
    latent = inputs["hidden_states"]
    with torch.no_grad():
        for now in torch.linspace(1000, 0, 9)[:-1]:
            time = torch.full_like(inputs["timestep"], float(now))
            ((velocity, nothing),) = model(**{**inputs, "hidden_states": latent, "timestep": time})
            assert nothing is None
            latent = latent - velocity / 8
    assert evaluations(model)[1] > 0


def test_attaching_twice_and_then_detaching_leaves_nothing_open():
    model, inputs = MODELS["sd3"]()
    exact = generation(model, inputs)
    compile_blocks(model)
    specdiff.attach(model, **SELECTING)
    again = specdiff.attach(model, **SELECTING)
    generation(model, inputs)
    assert sum(evaluations(model)[:3]) == 8
    again.detach()
    torch.testing.assert_close(generation(model, inputs), exact, **EXACT)


def test_an_attached_model_is_not_kept_alive():
    model, inputs = MODELS["sd3"]()
    attachment = specdiff.attach(compile_blocks(model), **SELECTING)
    generation(model, inputs)
    attachment.detach()
    dead = weakref.ref(model)
    del model, attachment
    torch._dynamo.reset()
    gc.collect()
    assert dead() is None


def test_blocks_left_out_are_noticed():
    """A selective step must not read caches that the dense step before it did not write."""
    model, inputs = MODELS["sd3"]()
    specdiff.attach(compile_blocks(model, dynamic=False), plan=Plan.warmup(1), cache_ratio=0.7)
    generation(model, inputs, 3)
    whole, model.transformer_blocks = model.transformer_blocks, model.transformer_blocks[1:]
    found = generation(model, inputs, 3)
    specdiff.reset(model)
    model.transformer_blocks = whole
    expected = generation(model, inputs)
    assert all(value.isfinite().all() for value in (*found, *expected))


def test_gradients_of_a_frozen_model():
    model, inputs = MODELS["sd3"]()
    model.requires_grad_(False)
    specdiff.attach(compile_blocks(model), **SELECTING)
    latent = inputs["hidden_states"].requires_grad_()
    (gradient,) = torch.autograd.grad(model(**inputs)[0].sum(), latent)
    assert gradient.abs().max() > 0


def test_compile_time_options_cannot_be_given():
    with pytest.raises(specdiff.OptionError, match="inner_backend"):
        specdiff.attach(flux()[0], inner_backend="eager")


FROM_THE_FOURTH = Plan.every(3, warmup=3, lookahead=0)
"""The fourth evaluation is the first that selects tokens."""


def test_times_that_are_numbers():
    """A number for the time is one call shape, not one a step."""

    class Numbered(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = compile_blocks(MODELS["sd3"]()[0])

        def forward(self, hidden_states, timestep, **inputs):
            time = torch.full((2,), float(timestep))
            return self.inner(hidden_states, timestep=time, **inputs)

    inputs = sd3(layers=2)[1]
    model, latent = Numbered(), inputs.pop("hidden_states")
    del inputs["timestep"]
    specdiff.attach(model, plan=FROM_THE_FOURTH, cache_ratio=0.5)
    with torch.no_grad():
        for time in (1000, 900, 800, 700, 600):
            latent = latent - 0.1 * model(latent, time, **inputs)[0]
    assert evaluations(model)[:2] == (3, 2)


def test_an_error_in_the_model_leaves_nothing_open():
    model, inputs = MODELS["flux"]()
    specdiff.attach(compile_blocks(model), **SELECTING)
    expected = generation(model, inputs)
    specdiff.reset(model)
    with pytest.raises(RuntimeError), torch.no_grad():
        model(**{**inputs, "encoder_hidden_states": torch.randn(2, 4, 7)})
    torch.testing.assert_close(generation(model, inputs), expected, **EXACT)


BROKEN = ("lumina2_transformer", "bria_fibo2_transformer", "omnigen_transformer")


@pytest.mark.parametrize(
    "name", [*BROKEN[:1], *(pytest.param(each, marks=pytest.mark.slow) for each in BROKEN[1:])]
)
def test_a_model_that_breaks_into_graphs(name):
    """Attached to the compiled model, whose graph with the blocks has neither latent nor time."""
    case = ZOO[name]()
    with torch.no_grad():
        case.model(**case.inputs)
        compiled = torch.compile(case.model, backend="specdiff", dynamic=False, options=EAGER)
        attachment = specdiff.attach(compiled, plan=FROM_THE_FOURTH, cache_ratio=0.1)
        inputs, errors = case.inputs, []
        for _ in range(5):
            exact, output = case.model(**inputs)[0], compiled(**inputs)[0]
            errors.append((output - exact).abs().median() / exact.abs().max())
            latent = inputs["hidden_states"] + 0.05 * output
            inputs = {**inputs, "hidden_states": latent, "timestep": inputs["timestep"] * 0.9}
    assert attachment.reasons() == ()
    assert evaluations(compiled)[1] == 2
    assert max(errors[:3]) < 1e-6
    # nine tokens of ten are computed, from caches in which the tenth is stale
    assert 0 < max(errors[3:]) < 0.02


@pytest.mark.parametrize("shape", [(2, 30, 5), (2, 4, 8, 12), (2, 3, 2, 8, 12), (1, 4, 4, 16, 8)])
@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 4, 4)])
def test_patches_there_and_back(shape, patch):
    patches = Patches(shape, patch[len(patch) - (len(shape) - 2) :] if len(shape) > 3 else ())
    output = torch.randn(shape)
    tokens = patches.split(output)
    assert tokens.shape[:2] == (shape[0], patches.tokens)
    assert torch.equal(patches.join(tokens), output)


def test_patches_are_those_of_the_model():
    """A token of SD3 is the patch that its unpatchify makes of it."""
    patches = next(possible((2, 4, 12, 16), frozenset({48})))
    assert patches.patch == (2, 2)
    output = torch.zeros(2, 4, 12, 16)
    output[:, :, 2:4, 4:6] = 1.0
    assert patches.split(output)[0].sum(1).nonzero().flatten().tolist() == [8 + 2]
