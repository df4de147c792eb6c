"""Any module, attached: whole steps are forecast from its boundary alone."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import specdiff
from specdiff.plan import Plan
from tests.models import flux

STEPS = 28
DENSE = len(specdiff.Options(quality="balanced").resolve().plan.dense)


class Denoiser(nn.Module):
    """A velocity of all that it is given, and how often it was computed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Linear(8, 8)
        self.calls = 0

    def velocity(self, latent: Tensor, sigma: Any, condition: Tensor) -> Tensor:
        self.calls += not torch.compiler.is_compiling()
        sigma = torch.as_tensor(sigma, dtype=latent.dtype)
        if sigma.dim() != latent.dim():
            sigma = sigma.reshape(-1, *[1] * (latent.dim() - 1))
        return torch.sin(self.mix(latent) + condition + 2 * sigma)

    def forward(self, hidden_states: Tensor, timestep: Any, condition: Tensor) -> Any:
        return self.velocity(hidden_states, timestep, condition)


@dataclasses.dataclass
class Output:
    sample: Tensor
    extra: Tensor | None = None


class Forms:
    """Ways in which models take latents and times and return predictions."""

    class Tuple(Denoiser):
        def forward(self, hidden_states, timestep, condition):
            return (super().forward(hidden_states, timestep, condition), None)

    class Dict(Denoiser):
        def forward(self, hidden_states, timestep, condition):
            return {"sample": super().forward(hidden_states, timestep, condition)}

    class Dataclass(Denoiser):
        def forward(self, hidden_states, timestep, condition):
            return Output(super().forward(hidden_states, timestep, condition))

    class LearnedVariance(Denoiser):
        def forward(self, hidden_states, timestep, condition):
            velocity = super().forward(hidden_states, timestep, condition)
            return torch.cat([velocity, velocity.abs()], dim=1)

    class Lists(Denoiser):
        def forward(self, x, t, condition):
            return [self.velocity(latent, t, condition[0]) for latent in x]

    class ListsByRow(Denoiser):
        def forward(self, x, t, condition):
            return [self.velocity(*sample) for sample in zip(x, t, condition, strict=True)]

    class TimeOfEachToken(Denoiser):
        def forward(self, hidden_states, timestep, condition):
            return super().forward(hidden_states, timestep.unsqueeze(-1), condition)

    class Packed(Denoiser):
        def forward(self, hidden_states, timestep, condition):
            packed = torch.cat([condition, hidden_states], dim=1)
            return super().forward(packed, timestep, condition)

    class OneDict(Denoiser):
        def forward(self, inputs):
            return self.velocity(inputs["x"], inputs["t"], inputs["text"])

    class Cache(Denoiser):
        """Hands back the keys that it was given."""

        def forward(self, hidden_states, timestep, condition, kv_cache):
            return super().forward(hidden_states, timestep, condition), [k * 1 for k in kv_cache]

    @staticmethod
    def named(time: str) -> Denoiser:
        class Named(Denoiser):
            def forward(self, hidden_states, condition, **times):
                return self.velocity(hidden_states, times[time], condition)

        return Named()

    class Two(Denoiser):
        """Picture and sound."""

        def forward(self, hidden_states, audio_hidden_states, timestep, condition):
            picture = self.velocity(hidden_states, timestep, condition)
            return picture, self.velocity(audio_hidden_states, timestep, condition)


def latents(seed: int = 0) -> Tensor:
    return torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(seed))


CONDITION = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(9))


def first(output: Any) -> Any:
    """The prediction in an output."""
    if dataclasses.is_dataclass(output):
        return output.sample
    if isinstance(output, dict):
        return output["sample"]
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def drawn(model: nn.Module, call: Any = None, time: Any = None, steps: int = STEPS) -> Tensor:
    """Euler on a flow."""
    latent = latents()
    make = time or (lambda sigma: torch.full((2,), sigma))
    call = call or (lambda x, t: first(model(x, t, condition=CONDITION)))
    for now, then in pairwise(torch.linspace(1, 0, steps + 1).tolist()):
        latent = latent + (then - now) * call(latent, make(now))[:, :6]
    return latent


def close(model: nn.Module, expected: Tensor, **kwargs: Any) -> None:
    """The plan was followed, and the result is what corrected forecasts give."""
    found = drawn(model, **kwargs)
    stats = specdiff.stats(model)
    assert (stats.dense, stats.skipped, stats.fallbacks) == (DENSE, STEPS - DENSE, {})
    assert ((found - expected).norm() / expected.norm()).item() < 2e-3


@pytest.mark.parametrize("kind", [Denoiser, Forms.Tuple, Forms.Dict, Forms.Dataclass])
def test_a_module_that_nobody_compiled(kind):
    model = kind()
    expected = drawn(model)
    model.calls = 0
    specdiff.attach(model)
    close(model, expected)
    assert model.calls == DENSE + 1  # and one to look


def test_a_learned_variance_is_forecast_too():
    model = Forms.LearnedVariance()
    expected = drawn(model)
    specdiff.attach(model)
    found = drawn(model)
    assert specdiff.stats(model).skipped == STEPS - DENSE
    assert ((found - expected).norm() / expected.norm()).item() < 2e-2


def test_lists_of_latents():
    model = Forms.Lists()

    def call(x: Tensor, t: Any) -> Tensor:
        return torch.stack(model(list(x), t, CONDITION))

    expected = drawn(model, call, time=lambda sigma: torch.tensor([sigma]))
    specdiff.attach(model)
    found = drawn(model, call, time=lambda sigma: torch.tensor([sigma]))
    assert specdiff.stats(model).skipped == STEPS - DENSE
    assert ((found - expected).norm() / expected.norm()).item() < 2e-3


@torch.no_grad()
def test_several_latents_are_forecast_together():
    model, results = Forms.Two(), []
    for _ in range(2):
        picture, sound = latents(), latents(1)
        for now, then in pairwise(torch.linspace(1, 0, STEPS + 1).tolist()):
            velocities = model(picture, sound, torch.full((2,), now), CONDITION)
            picture, sound = (
                x + (then - now) * v for x, v in zip((picture, sound), velocities, strict=True)
            )
        results.append((picture, sound))
        specdiff.attach(model)
    assert specdiff.stats(model).skipped == STEPS - DENSE
    for expected, found in zip(*results, strict=True):
        assert ((found - expected).norm() / expected.norm()).item() < 2e-3


@pytest.mark.parametrize(
    "time",
    [
        float,
        torch.tensor,
        lambda s: torch.tensor([s]),
        lambda s: torch.full((2, 1), s),
        lambda s: torch.tensor(s, dtype=torch.float64),
    ],
    ids=["float", "0-d", "[1]", "[B, 1]", "float64"],
)
def test_times_in_whatever_form(time):
    model = Denoiser()
    expected = drawn(model, time=time)
    specdiff.attach(model)
    close(model, expected, time=time)


def test_positional_arguments_and_keywords():
    model = Denoiser()
    expected = drawn(model)
    specdiff.attach(model)
    close(model, expected, call=lambda x, t: model(x, t, CONDITION))
    specdiff.reset(model)
    everything = {"condition": CONDITION}
    close(model, expected, call=lambda x, t: model(timestep=t, hidden_states=x, **everything))


def test_a_time_of_another_name():
    class Named(Denoiser):
        def forward(self, hidden_states, noise_level, condition):
            return self.velocity(hidden_states, noise_level, condition)

    model = Named()
    expected = drawn(model)
    attachment = specdiff.attach(model)
    drawn(model)
    assert "name it by the option timestep_arg" in attachment.reasons()[0]
    assert specdiff.stats(model).dense == STEPS
    assert "step plan: no, because no time input was found" in str(specdiff.stats(model))
    specdiff.attach(model, timestep_arg="noise_level")
    specdiff.reset(model)
    close(model, expected)
    assert specdiff.stats(model).no_step_plan == ""
    assert specdiff.stats(model).no_selection == "no block of the model is compiled by specdiff"


def hook(model: nn.Module) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(model, AlignDevicesHook(io_same_device=True))


def compile_in_place(model: nn.Module) -> None:
    model.compile(backend="eager")


@pytest.mark.parametrize(
    "steps",
    [
        [specdiff.attach, compile_in_place],
        [compile_in_place, specdiff.attach],
        [specdiff.attach, hook],
        [hook, specdiff.attach],
        [hook, specdiff.attach, compile_in_place],
        [compile_in_place, specdiff.attach, hook],
    ],
)
def test_attached_before_or_after_others(steps):
    torch._dynamo.reset()
    model = Denoiser()
    expected = drawn(model)
    for step in steps:
        step(model)
    close(model, expected)


def test_attached_to_what_torch_compile_returned():
    torch._dynamo.reset()
    model = Denoiser()
    expected = drawn(model)
    compiled = torch.compile(model, backend="eager")
    specdiff.attach(compiled)
    close(compiled, expected)


def test_a_model_that_breaks_into_graphs_is_one_model():
    class Broken(Denoiser):
        def forward(self, hidden_states, timestep, condition):
            torch._dynamo.graph_break()
            hidden_states = hidden_states + condition
            torch._dynamo.graph_break()
            return super().forward(hidden_states, timestep, condition)

    torch._dynamo.reset()
    model = Broken()
    expected = drawn(model)
    model.compile(backend="specdiff", options={"inner_backend": "eager"})
    specdiff.attach(model)
    close(model, expected)


def test_detached_it_is_the_model_again():
    model = Denoiser()
    expected, kind = drawn(model), type(model)
    specdiff.attach(model)
    drawn(model)
    specdiff.detach(model)
    assert type(model) is kind
    torch.testing.assert_close(drawn(model), expected, rtol=0, atol=0)
    specdiff.detach(model)  # twice does no harm


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_not_attached(copied):
    model = Denoiser()
    specdiff.attach(model)
    drawn(model)
    other = copied(model)
    drawn(other)
    assert other.calls - model.calls == STEPS
    assert type(other) is Denoiser
    specdiff.attach(other)
    drawn(other)
    assert specdiff.stats(other).skipped == STEPS - DENSE


def test_all_steps_dense_is_the_model_to_the_bit():
    model = Denoiser()
    expected = drawn(model)
    specdiff.attach(model, plan=Plan.every(1))
    torch.testing.assert_close(drawn(model), expected, rtol=0, atol=0)
    assert specdiff.stats(model).dense == STEPS


def test_a_plan_that_selects_tokens_runs_those_steps_dense_and_says_so(caplog):
    model = Denoiser()
    specdiff.attach(model, plan=Plan((0, 1, 0.5, 1, 0)), cache_ratio=1.0)
    drawn(model, steps=5)
    stats = specdiff.stats(model)
    assert (stats.dense, stats.skipped) == (3, 2)
    assert stats.fallbacks == {"no tokens can be selected": 1}
    assert "no block of the model is compiled by specdiff" in caplog.text


def test_outputs_and_latents_may_be_overwritten_by_the_caller():
    model = Denoiser()
    expected = drawn(model)
    specdiff.attach(model)
    latent = latents()
    with torch.no_grad():
        for now, then in pairwise(torch.linspace(1, 0, STEPS + 1).tolist()):
            velocity = model(latent, torch.full((2,), now), CONDITION)
            latent += (then - now) * velocity
            velocity.fill_(torch.nan)
    assert specdiff.stats(model).skipped == STEPS - DENSE
    assert ((latent - expected).norm() / expected.norm()).item() < 2e-3


def test_stats_survive_parameters_that_are_swapped():
    """As sequential offload does between calls."""
    model = Denoiser()
    specdiff.attach(model)
    drawn(model, steps=4)
    model.mix.weight = nn.Parameter(model.mix.weight.detach().clone())
    model.mix.bias = nn.Parameter(model.mix.bias.detach().clone())
    drawn(model, steps=4)
    assert specdiff.stats(model).evaluations == 8


def test_a_refused_graph_is_forecast_by_whole_steps():
    """A graph without attention has no tokens, but a latent, a time and a prediction."""
    torch._dynamo.reset()
    model = Denoiser()
    expected = drawn(model)
    model.compile(backend="specdiff", options={"inner_backend": "eager"})
    close(model, expected)


def test_a_graph_that_writes_to_an_input_is_never_left_out():
    class Writing(Denoiser):
        def forward(self, hidden_states, timestep, condition, cache):
            cache[0] = hidden_states.mean()
            return super().forward(hidden_states, timestep, condition)

    torch._dynamo.reset()
    model, cache = Writing(), torch.zeros(3)
    model.compile(backend="specdiff", options={"inner_backend": "eager"})
    seen = set()

    def call(x: Tensor, t: Any) -> Tensor:
        velocity = model(x, t, CONDITION, cache)
        seen.add(cache[0].item())
        return velocity

    drawn(model, call)
    assert len(seen) == STEPS


def test_whole_steps_of_a_transformer_are_those_of_its_graph():
    """The same plan, the same forecasts: the token-level form against the boundary's."""
    torch._dynamo.reset()
    model, inputs = flux(layers=1, single_layers=1)
    other = copy.deepcopy(model)
    specdiff.attach(other)
    model.compile(backend="specdiff", options={"inner_backend": "eager"})
    results = []
    with torch.no_grad():
        for each in (model, other):
            latent = inputs["hidden_states"]
            for now, then in pairwise(torch.linspace(1, 0, STEPS + 1).tolist()):
                time = torch.full_like(inputs["timestep"], now)
                call = {**inputs, "hidden_states": latent, "timestep": time}
                latent = latent + (then - now) * each(**call)[0]
            results.append(latent)
            assert specdiff.stats(each).skipped == STEPS - DENSE
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_text_in_front_of_the_prediction():
    """One sequence of text and image comes back, of which the image is denoised."""
    model = Forms.Packed()
    expected = drawn(model, lambda x, t: model(x, t, CONDITION)[:, -6:])
    specdiff.attach(model)
    found = drawn(model, lambda x, t: model(x, t, CONDITION)[:, -6:])
    stats = specdiff.stats(model)
    assert stats.skipped == STEPS - DENSE and not stats.fallbacks
    assert ((found - expected).norm() / expected.norm()).item() < 2e-2


def test_latent_and_time_in_a_dict():
    model = Forms.OneDict()
    expected = drawn(model, lambda x, t: model({"x": x, "t": t, "text": CONDITION}))
    specdiff.attach(model)
    close(model, expected, call=lambda x, t: model({"x": x, "t": t, "text": CONDITION}))


def test_caches_that_come_back_are_no_latents():
    model = Forms.Cache()
    cache = [torch.randn(2, 4, 8)]
    expected = drawn(model, lambda x, t: model(x, t, CONDITION, cache)[0])
    specdiff.attach(model)
    close(model, expected, call=lambda x, t: model(x, t, CONDITION, cache)[0])


@pytest.mark.parametrize("name", ["time", "sigma", "video_timesteps", "decoder_noise_time"])
def test_usual_names_of_the_time(name):
    model = Forms.named(name)
    expected = drawn(model, lambda x, t: model(hidden_states=x, condition=CONDITION, **{name: t}))
    specdiff.attach(model)
    close(
        model,
        expected,
        call=lambda x, t: model(hidden_states=x, condition=CONDITION, **{name: t}),
    )
