"""Steps without text: what is left out, and models whose text cannot be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from specdiff.errors import Unsupported
from specdiff.passes.emit.rows import emit_selective
from specdiff.passes.emit.whole import emit_dense
from specdiff.passes.emit.without_text import emit_without_text, joins_text
from tests.models import changed, flux, randomize, sd3
from tests.oracles import trace
from tests.passes.checks import check_oracles, without_text
from tests.passes.toys import CHANNELS, TEXT, TOKENS, Toy, toy, toy_inputs

aten = torch.ops.aten
COUNT = 5


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def row_counts(module):
    """Tokens of every attention's query."""
    attentions = module.graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    )
    return [node.args[0].meta["val"].shape[-2] for node in attentions]


def linears(module):
    return len(module.graph.find_nodes(op="call_function", target=aten.linear.default))


@pytest.mark.parametrize("build", [flux, sd3])
def test_no_text_is_computed(build):
    model, inputs = build(layers=1, batch=1)
    found = trace(model, inputs, changed(inputs)).analysis
    arguments = (found.module, found.selection, 8)
    text = inputs["encoder_hidden_states"].shape[1]
    with_text, without = emit_selective(*arguments, COUNT), emit_without_text(*arguments, COUNT)
    assert set(row_counts(with_text)) == {COUNT + text}
    assert set(row_counts(without)) == {COUNT}
    # embedding, modulation and stream of the text are gone
    assert linears(without) < linears(with_text) == linears(emit_dense(*arguments))
    for node in without.graph.nodes:
        value = node.meta.get("val")
        assert not isinstance(value, torch.Tensor) or 0 not in value.shape


def test_a_model_without_text_has_nothing_to_leave_out():
    model, inputs = toy(lambda t, x: x, text=False)
    found = trace(model, inputs, changed(inputs))
    assert not joins_text(found.analysis.selection)
    programs = found.programs()
    assert not without_text(found, programs)
    assert not any(name.startswith("textless") for name in programs.compile_seconds)


class Pooled(Toy):
    """The mean of the text, after an attention, is added to the image."""

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        x = self.embed(hidden_states) + timestep.sin()[:, None, None]
        joint = self.attention(torch.cat([self.embed_text(encoder_hidden_states), x], 1))
        text, x = joint[:, :TEXT], joint[:, TEXT:]
        joint = self.attention(torch.cat([text, x + text.mean(1, keepdim=True)], 1))
        return (self.head(joint[:, TEXT:]),)


class Crossed(Toy):
    """The image attends to the text alone, after both attended to both."""

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        x = self.embed(hidden_states) + timestep.sin()[:, None, None]
        joint = self.attention(torch.cat([self.embed_text(encoder_hidden_states), x], 1))
        text, x = joint[:, :TEXT], joint[:, TEXT:]
        out = F.scaled_dot_product_attention(
            self.heads(self.q(x)), self.heads(self.k(text)), self.heads(self.v(text))
        )
        return (self.head(x + self.o(out.transpose(1, 2).flatten(2))),)


@pytest.mark.parametrize("model", [Pooled, Crossed])
def test_text_that_is_read_otherwise_is_always_computed(model, caplog):
    built, inputs = randomize(model(lambda t, x: x)), toy_inputs()
    found = trace(built, inputs, changed(inputs))
    with pytest.raises(Unsupported, match="otherwise than by attention"):
        emit_without_text(found.analysis.module, found.analysis.selection, 8, COUNT)
    programs = found.programs()
    assert not without_text(found, programs)
    assert "text_steps='dense' has no effect" in caplog.text
    # and what runs instead is right
    check_oracles(built, (inputs, changed(inputs)), found)


def test_text_of_one_sample_for_all():
    """Text that is broadcast over samples stays what the caches hold of each."""

    class Broadcast(Toy):
        def forward(self, hidden_states, encoder_hidden_states, timestep):
            text = encoder_hidden_states[:1].expand(len(hidden_states), -1, -1)
            return super().forward(hidden_states, text, timestep)

    built, inputs = randomize(Broadcast(lambda t, x: x)), toy_inputs()
    found = trace(built, inputs, changed(inputs))
    assert without_text(found, found.programs(), rtol=1e-5, atol=1e-5)


def test_joint_rows_in_a_middle():
    """Norms and linears on the joint sequence: text is left out of all of them."""

    class Joint(nn.Module):
        def __init__(self):
            super().__init__()
            self.toy = Toy(lambda t, x: x)

        def forward(self, hidden_states, encoder_hidden_states, timestep):
            toy = self.toy
            x = toy.embed(hidden_states) + timestep.sin()[:, None, None]
            joint = torch.cat([x, toy.embed_text(encoder_hidden_states)], 1)
            for _ in range(2):
                joint = toy.attention(joint)
                joint = joint + toy.o(toy.norm(joint).tanh())
            return (toy.head(joint[:, :TOKENS]),)

    built, inputs = randomize(Joint()), toy_inputs()
    found = trace(built, inputs, changed(inputs))
    check_oracles(built, (inputs, changed(inputs)), found)
    assert without_text(found, found.programs(), rtol=1e-5, atol=1e-5)


def test_a_joint_table_cut_where_no_attention_is():
    """Modulation of text and image in one, the image's cut out of it behind the last attention."""

    class Tabled(Toy):
        def forward(self, hidden_states, encoder_hidden_states, timestep):
            time = timestep.sin()[:, None, None]
            joint = torch.cat(
                [self.embed_text(encoder_hidden_states), self.embed(hidden_states)], 1
            )
            of_text = time.cos().expand(-1, TEXT, CHANNELS)
            table = torch.cat([of_text, time.expand(-1, TOKENS, CHANNELS)], 1)
            joint = self.attention(self.attention(joint))
            return (self.head(joint[:, TEXT:] * table[:, TEXT:]),)

    built, inputs = randomize(Tabled(lambda t, x: x)), toy_inputs()
    found = trace(built, inputs, changed(inputs))
    check_oracles(built, (inputs, changed(inputs)), found)
    assert without_text(found, found.programs(), rtol=1e-5, atol=1e-5)
