"""Which model a graph is a part of, by who calls while it is compiled."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import specdiff
from specdiff.caller import calling_module, model_of_part

Look = Callable[[nn.Module], Any]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.looks: list[Look] = []

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.seen = [look(self) for look in self.looks]
        return torch.sin(self.mix(hidden_states))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(4, 4), Block()

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        first = self.first(hidden_states)
        torch._dynamo.graph_break()
        return first + self.block(hidden_states) + timestep


class Wrapper(nn.Module):
    """As ComfyUI's: it has no parameters of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.model(hidden_states=x, timestep=timestep)


INPUTS = torch.randn(2, 3, 4), torch.ones(1)


def seen(model: nn.Module, look: Look) -> Any:
    """What a look from within the block finds."""
    block = next(each for each in model.modules() if isinstance(each, Block))
    block.looks = [look]
    model(*INPUTS)
    return block.seen[0]


def called(parameters: Any, time: str = "timestep", cut: bool = False) -> Any:
    return model_of_part(list(parameters), lambda name: name == time, is_cut=cut)


def test_a_block_is_a_part_of_the_model_that_takes_a_time():
    model = Model()
    assert seen(model, lambda block: called(block.parameters())) is model
    wrapper = Wrapper(model)
    wrapper.more = nn.Linear(2, 2)
    assert seen(wrapper, lambda block: called(block.parameters())) is wrapper


def test_a_time_of_another_name():
    assert seen(Model(), lambda block: called(block.parameters(), "sigma")) is None


def test_all_of_a_model_is_no_part_of_what_wraps_it():
    model = Model()
    assert seen(Wrapper(model), lambda _: called(model.parameters())) is None


def test_parameters_of_another_model():
    other = Model()
    assert seen(Model(), lambda _: called(other.parameters())) is None


def test_a_graph_without_parameters_is_part_of_any_model():
    model = Model()
    assert seen(model, lambda _: called([])) is model


@pytest.mark.parametrize("cut", [False, True])
def test_what_a_forward_begins_with(cut):
    """A hook sees the stack as a backend does that is given a graph of the forward itself."""
    model, found = Model(), []
    first = model.first.parameters
    model.register_forward_pre_hook(lambda *_: found.append(called(first(), cut=cut)))
    model(*INPUTS)
    assert found == [model if cut else None]


def test_nobody_calls():
    assert called([]) is None
    assert calling_module() is None


def test_the_innermost_module_that_calls():
    model = Model()
    assert seen(model, lambda _: calling_module()) is model.block


@pytest.mark.parametrize("attach", [False, True])
@torch.no_grad()
def test_parts_of_a_compiled_model_are_one_model(attach, caplog):
    model = Model()
    model.compile(backend="specdiff", options={"inner_backend": "eager"})
    if attach:
        specdiff.attach(model)
    latent, time = INPUTS
    for step in range(4):
        model(latent, time - step / 4)
    stats = specdiff.stats(model)
    assert stats.evaluations == 4
    said = f"step plan: {'yes' if attach else 'no, because the model breaks into graphs'}"
    assert said in str(stats)
    if not attach:
        assert "no, because the model breaks into graphs" in str(specdiff.explain(model, *INPUTS))
        (message,) = caplog.messages
        assert "specdiff.attach(model), with the Model as model" in message
        assert "graph_break" in message  # the cause
    else:
        assert "specdiff.attach" not in caplog.text


@torch.no_grad()
def test_a_graph_with_a_boundary_that_a_break_cuts_off_is_no_model():
    """What it returns has the shape of the latent, and is not the model's prediction."""

    class Cut(Model):
        def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
            first = self.first(hidden_states) * timestep
            torch._dynamo.graph_break()
            return self.block(first)

    torch._dynamo.reset()
    model = Cut()
    latent, time = INPUTS
    expected = [model(latent, time - step / 4) for step in range(4)]
    model.compile(backend="specdiff", options={"inner_backend": "eager"})
    found = [model(latent, time - step / 4) for step in range(4)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert specdiff.stats(model).dense == 4


@torch.no_grad()
def test_parts_keep_no_model_alive():
    model = Model()
    model.compile(backend="specdiff", options={"inner_backend": "eager"}, dynamic=True)
    model(*INPUTS)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
