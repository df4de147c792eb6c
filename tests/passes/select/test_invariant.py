"""Values that no step changes: which are kept, which must not be, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import specdiff
from specdiff.passes.base import PassError
from specdiff.passes.emit.rows import emit_selective
from specdiff.passes.emit.whole import emit_dense
from specdiff.passes.graph.dependence import descendants
from specdiff.passes.select.cost import CostModel
from specdiff.passes.select.input_roles import VaryingInputs
from specdiff.passes.select.invariant import InvariantPass
from specdiff.passes.select.signature import varying_inputs
from tests.models import changed, flux, randomize, sd3
from tests.oracles import small_tables, trace
from tests.passes.checks import check_oracles
from tests.passes.toys import Toy, toy_inputs

aten = torch.ops.aten
COUNT = 5


@pytest.fixture(autouse=True)
def _any_size(monkeypatch):
    """Whatever pays in a large model is kept in a small one."""
    monkeypatch.setattr("specdiff.passes.select.invariant.LEAST", 200 * 16)
    with torch.no_grad():
        yield


def kept(found):
    """Target and shape of every value that is kept."""
    selection = found.analysis.selection
    return [(str(n.target), tuple(n.meta["val"].shape)) for n in selection.fixed]


def count(found, emit, target, *arguments):
    module = emit(found.analysis.module, found.analysis.selection, 8, *arguments)
    return len(module.graph.find_nodes(op="call_function", target=target))


def test_flux_keeps_rotary_tables_and_the_text_embedding():
    model, inputs = flux(text=40, batch=1)
    with small_tables():
        found = trace(model, inputs, changed(inputs))
    names = [name for name, _ in kept(found)]
    assert names.count("aten.linear.default") == 1  # the text; pooled, it goes with time
    assert (str(aten.linear.default), (1, 40, 32)) in kept(found)
    tables = [shape for name, shape in kept(found) if "linear" not in name]
    assert tables == [(82, 16)] * 2
    # sinusoids of the time are not made either: what is made of them is looked up
    functions = [count(found, emit, aten.cos.default, *rest) for emit, *rest in EMITS]
    assert functions == [4, 0]
    check_oracles(model, (inputs, changed(inputs)), found)


EMITS = ((emit_dense,), (emit_selective, COUNT))


def test_what_depends_on_time_is_never_kept():
    for build in (flux, sd3):
        model, inputs = build(batch=1)
        analysis = trace(model, inputs).analysis
        is_state = [spec.role == "parameter" for spec in analysis.signature.inputs]
        varying = varying_inputs(analysis.selection, is_state, None)
        names = {str(node.meta["source"]) for node in varying.all}
        assert any("timestep" in name for name in names)
        assert any("hidden_states" in name for name in names)
        assert not any("encoder" in name or "pooled" in name for name in names)
        changing = descendants(analysis.selection.axes.graph, varying.all)
        assert analysis.selection.fixed
        assert changing.isdisjoint(analysis.selection.fixed)


def test_a_value_that_varies_is_seen_by_the_verifier():
    model, inputs = flux(batch=1)
    analysis = trace(model, inputs).analysis
    step = InvariantPass(
        lambda selection: VaryingInputs(None, (), ())
    )  # nothing varies, it is told
    wrong = step.apply(analysis.selection)
    is_state = [spec.role == "parameter" for spec in analysis.signature.inputs]
    honest = InvariantPass(lambda selection: varying_inputs(selection, is_state, None))
    with pytest.raises(PassError, match="changes from step to step"):
        honest.verify(analysis.selection, wrong)


class Cross(Toy):
    """Cross-attention to the text: its keys and values are the same at every step."""

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        x = self.attention(self.embed(hidden_states) + timestep.sin()[:, None, None])
        text = self.embed_text(encoder_hidden_states)
        out = F.scaled_dot_product_attention(
            self.heads(self.q(x)), self.heads(self.k(text)), self.heads(self.v(text))
        )
        return (self.head(x + self.o(out.transpose(1, 2).flatten(2))),)


class Timed(Cross):
    """The near miss: the text is told the time."""

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        text = encoder_hidden_states * timestep[:, None, None]
        return super().forward(hidden_states, text, timestep)


def test_keys_and_values_of_text_are_kept(monkeypatch):
    # the toy is eight wide: a linear of it does little for the bytes that it makes
    monkeypatch.setattr("specdiff.passes.select.invariant.WORTH", 1.0)
    monkeypatch.setattr("specdiff.passes.select.invariant.LEAST", 0)
    model, inputs = randomize(Cross(lambda t, x: x)), toy_inputs()
    found = trace(model, inputs, changed(inputs))
    assert [name for name, _ in kept(found)] == ["aten.linear.default"] * 2
    dense, selective = (count(found, emit, aten.linear.default, *rest) for emit, *rest in EMITS)
    assert selective == dense - 3
    check_oracles(model, (inputs, changed(inputs)), found)

    model = randomize(Timed(lambda t, x: x))
    found = trace(model, inputs, changed(inputs))
    assert kept(found) == []
    check_oracles(model, (inputs, changed(inputs)), found)


def test_what_is_cheap_to_make_again_is_not_kept():
    class Scaled(Toy):
        def forward(self, hidden_states, encoder_hidden_states, timestep):
            text = (encoder_hidden_states * 2 + 1).relu()
            return super().forward(hidden_states, text, timestep)

    model, inputs = randomize(Scaled(lambda t, x: x)), toy_inputs()
    found = trace(model, inputs, changed(inputs))
    assert not any(shape == (2, 3, 5) for _, shape in kept(found))
    check_oracles(model, (inputs, changed(inputs)), found)


def test_kept_values_are_caches():
    """Allocated, counted and bounded as those are; selective steps no longer compute them."""
    model, inputs = flux(text=40, batch=1)
    analysis = trace(model, inputs).analysis
    signature, selection = analysis.signature, analysis.selection
    assert len(signature.caches) == len(selection.cached) + len(selection.fixed) + len(
        selection.tabulated
    )
    cost = CostModel(selection)
    assert (
        cost.sizes.evaluate(cost.caches([*selection.cached, *selection.known]))
        == signature.cache_bytes
    )
    linear = next(n for n in selection.fixed if n.target is aten.linear.default)
    assert cost.sizes.evaluate(cost.selective_work([linear]).flops) == 0
    assert cost.sizes.evaluate(cost.dense_work([linear]).flops) > 0


def test_another_prompt_is_read_anew():
    """Generations of two prompts, one after the other, are those of each alone, to the bit."""

    def generation(compiled, prompt, inputs):
        latent, outputs = inputs["hidden_states"], []
        for sigma in (1.0, 0.9, 0.75, 0.5, 0.2):
            call = {**inputs, "hidden_states": latent, "encoder_hidden_states": prompt}
            velocity = compiled(**call, timestep=torch.full((1,), sigma))[0]
            outputs.append(velocity)
            latent = latent - 0.2 * velocity
        return torch.stack(outputs)

    model, inputs = flux(text=40, batch=1)
    del inputs["timestep"]
    first = inputs.pop("encoder_hidden_states")
    options = {"inner_backend": "eager", "method": "paper", "cache_ratio": 0.5}
    compiled = torch.compile(model, backend="specdiff", fullgraph=True, options=options)
    alone = generation(compiled, second := torch.randn_like(first), inputs)
    specdiff.reset(compiled)
    other = generation(compiled, first, inputs)
    again = generation(compiled, second, inputs)
    assert specdiff.stats(compiled).selective == 4
    assert torch.equal(again, alone)
    assert not torch.allclose(other, alone, rtol=1e-3)
