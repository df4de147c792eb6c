"""Values that time alone moves: which are looked up, that they are right, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from specdiff import torch_adapter
from specdiff.passes.base import PassError
from specdiff.passes.emit import emit_dense, emit_timetable
from specdiff.passes.rows import emit_selective
from specdiff.passes.signature import varying_inputs
from specdiff.passes.timetable import TimetablePass
from specdiff.program import TIMES_AT_ONCE
from tests.models import changed, flux, randomize, sd3
from tests.oracles import small_tables, trace
from tests.passes.checks import TOLERANCE, caches_of, check_oracles
from tests.passes.toys import Toy, toy_inputs

aten = torch.ops.aten
COUNT = 5


@pytest.fixture(autouse=True)
def _small():
    with small_tables(), torch.no_grad():
        yield


def linears(program):
    return len(program.graph.find_nodes(op="call_function", target=aten.linear.default))


@pytest.mark.parametrize("build", [flux, sd3])
def test_modulations_are_looked_up_and_nothing_is_left_of_their_making(build):
    model, inputs = build(batch=2)
    found = trace(model, inputs, changed(inputs))
    module, plan = found.analysis.module, found.analysis.plan
    adaptive = [m for m in model.modules() if type(m).__name__.startswith("AdaLayerNorm")]
    assert len(plan.tabulated) == len(adaptive)
    selective = emit_selective(module, plan, 0, COUNT)
    # an embedding of time and one of guidance or pooled text have two linears each
    gone = len(adaptive) + linears(emit_dense(module, plan, 0)) - linears(selective)
    assert gone >= 2 * len(adaptive) + 4
    check_oracles(model, (inputs, changed(inputs)), found)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("build", [flux, sd3])
def test_every_row_is_that_of_its_time(build, backend):
    """Tables filled for several times hold, in each row, what one filled for it alone holds."""
    model, inputs = build(batch=2)
    found = trace(model, inputs)
    programs, flat = found.programs(backend), found.flat[0]
    index, caches = found.analysis.signature.time, caches_of(found)
    count = len(found.analysis.plan.tabulated)
    times = [flat[index] * factor for factor in (1.0, 0.7, 0.4)]
    programs.tabulate(flat, caches, times)
    tables = [cache.clone() for cache in caches[-count:]]
    for row, time in enumerate(times):
        programs.tabulate(flat, caches, [time])
        for table, alone in zip(tables, caches[-count:], strict=True):
            torch.testing.assert_close(table[row], alone[0], **TOLERANCE)
            torch.testing.assert_close(alone, alone[:1].expand_as(alone), **TOLERANCE)
    assert not torch.allclose(tables[0][0], tables[0][1], **TOLERANCE)


def test_a_selective_step_reads_the_row_it_is_told():
    model, inputs = flux(batch=1)
    found = trace(model, inputs)
    programs, flat = found.programs(), found.flat[0]
    index, caches = found.analysis.signature.time, caches_of(found)
    programs.dense(flat, caches)
    active = torch.arange(COUNT)[None]
    early, late = flat[index], flat[index] / 2
    at_late = [*flat[:index], late, *flat[index + 1 :]]
    expected = programs.selective(at_late, caches, active).tokens.clone()
    programs.tabulate(flat, caches, [early, late])
    # its own time input counts for nothing any more
    actual = programs.selective(flat, caches, active, row=1).tokens
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    other = programs.selective(flat, caches, active, row=0).tokens
    assert not torch.allclose(other, expected, **TOLERANCE)


def test_a_dense_step_leaves_tables_alone():
    model, inputs = flux(batch=1)
    found = trace(model, inputs)
    caches, count = caches_of(found), len(found.analysis.plan.tabulated)
    found.programs().dense(found.flat[0], caches)
    assert all(cache.isnan().all() for cache in caches[-count:])
    assert all(len(cache) == TIMES_AT_ONCE for cache in caches[-count:])


class Shifted(Toy):
    """A shift made of time, and of more that `more` adds."""

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        x = self.embed(hidden_states)
        shift = self.o(timestep.sin()[:, None] * torch.ones(8) + self.more(x))
        x = self.attention(x + shift[:, None])
        return (self.head(x),)


@pytest.mark.parametrize(
    ("more", "linears"),
    [
        (lambda x: 0.0, 1),
        (lambda x: torch.arange(8), 1),  # a tensor made within
        (lambda x: torch.tensor(1.5), 1),  # a constant
        (lambda x: x.mean(1), 0),
    ],
    ids=["time alone", "a range", "a constant", "the latent too"],
)
def test_what_depends_on_the_latent_is_not_looked_up(more, linears):
    model, inputs = randomize(Shifted(lambda t, x: x)), toy_inputs()
    model.more = more
    found = trace(model, inputs, changed(inputs))
    targets = [node.target for node in found.analysis.plan.tabulated]
    assert targets.count(aten.linear.default) == linears
    check_oracles(model, (inputs, changed(inputs)), found)


def test_tokens_that_time_moves_are_not_looked_up():
    """A table of text would be as large as many caches."""

    class TimedText(Toy):
        def forward(self, hidden_states, encoder_hidden_states, timestep):
            text = encoder_hidden_states * timestep[:, None, None]
            return super().forward(hidden_states, text, timestep)

    model, inputs = randomize(TimedText(lambda t, x: x)), toy_inputs()
    found = trace(model, inputs, changed(inputs))
    assert not any(node.meta["val"].dim() > 1 for node in found.analysis.plan.tabulated)
    check_oracles(model, (inputs, changed(inputs)), found)


def test_a_value_that_depends_on_more_is_seen_by_the_verifier():
    model, inputs = flux(batch=1)
    analysis = trace(model, inputs).analysis
    states = [spec.role == "parameter" for spec in analysis.signature.inputs]
    step = TimetablePass(lambda plan: varying_inputs(plan, states, None), torch_adapter.vectorized)
    plan = analysis.plan
    step.verify(plan, plan)
    moved = dataclasses.replace(plan.timetable, values=(plan.slots[0],))
    with pytest.raises(PassError, match="does not depend on time alone"):
        step.verify(plan, dataclasses.replace(plan, timetable=moved))


def test_an_op_that_cannot_be_vectorized_is_computed_as_ever():
    def refuse(*_):
        raise NotImplementedError("no batching rule")

    model, inputs = flux(batch=1)
    analysis = trace(model, inputs).analysis
    states = [spec.role == "parameter" for spec in analysis.signature.inputs]
    step = TimetablePass(lambda plan: varying_inputs(plan, states, None), refuse)
    plan = step.apply(analysis.plan)
    assert plan is analysis.plan
    assert step.summary(analysis.plan).endswith("NotImplementedError: no batching rule")


def test_the_program_of_tables_writes_nothing_else():
    model, inputs = flux(batch=1)
    found = trace(model, inputs)
    program = emit_timetable(found.analysis.module, found.analysis.plan)
    written = [
        node.args[0].name
        for node in program.graph.find_nodes(op="call_function", target=aten.copy_.default)
    ]
    assert written == [f"cache_{node.name}" for node in found.analysis.plan.tabulated]
    assert program.graph.output_node().args == ((),)
