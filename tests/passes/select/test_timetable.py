"""Values that time alone moves: which are looked up, that they are right, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from specdiff import torch_adapter
from specdiff.errors import Unsupported
from specdiff.passes.base import PassError
from specdiff.passes.emit.rows import emit_selective
from specdiff.passes.emit.whole import emit_dense, emit_timetable, emit_timetable_row
from specdiff.passes.select.signature import varying_inputs
from specdiff.passes.select.timetable import TimetablePass
from specdiff.program import TIMES_AT_ONCE
from tests.models import ZOO, changed, flux, randomize, sd3
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


@pytest.mark.parametrize("build", [pytest.param(flux, marks=pytest.mark.slow), sd3])
def test_modulations_are_looked_up_and_nothing_is_left_of_their_making(build):
    model, inputs = build(batch=2)
    found = trace(model, inputs, changed(inputs))
    module, selection = found.analysis.module, found.analysis.selection
    adaptive = [m for m in model.modules() if type(m).__name__.startswith("AdaLayerNorm")]
    assert len(selection.tabulated) == len(adaptive)
    selective = emit_selective(module, selection, 0, COUNT)
    # an embedding of time and one of guidance or pooled text have two linears each
    gone = len(adaptive) + linears(emit_dense(module, selection, 0)) - linears(selective)
    assert gone >= 2 * len(adaptive) + 4
    check_oracles(model, (inputs, changed(inputs)), found)


def at(found, factor):
    """The first call's flat inputs at a multiple of its time."""
    flat, index = found.flat[0], found.analysis.signature.time
    return [*flat[:index], flat[index] * factor, *flat[index + 1 :]]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("build", [flux, sd3])
def test_every_row_is_that_of_its_time(build, backend):
    """Tables filled for several times hold, in each row, what one filled for it alone holds."""
    model, inputs = build(batch=2)
    found = trace(model, inputs)
    programs, caches = found.programs(backend), caches_of(found)
    count, index = len(found.analysis.selection.tabulated), found.analysis.signature.time
    calls = [at(found, factor) for factor in (1.0, 0.7, 0.4)]
    programs.tabulate(calls[0], caches, [call[index] for call in calls[1:]])
    tables = [cache.clone() for cache in caches[-count:]]
    for row, call in enumerate(calls):
        programs.tabulate(call, caches)
        for table, alone in zip(tables, caches[-count:], strict=True):
            torch.testing.assert_close(table[row], alone[0], **TOLERANCE)
            torch.testing.assert_close(table[1:], alone[1:], rtol=0, atol=0)  # left alone
    assert not torch.allclose(tables[0][0], tables[0][1], **TOLERANCE)
    assert programs.compile_seconds.keys() == {"timetable", "timetable_row"}


def test_a_selective_step_reads_the_row_it_is_told():
    model, inputs = flux(batch=1)
    found = trace(model, inputs)
    programs, early, late = found.programs(), at(found, 1.0), at(found, 0.5)
    index, caches = found.analysis.signature.time, caches_of(found)
    programs.dense(early, caches)
    active = torch.arange(COUNT)[None]
    expected = programs.selective(late, caches, active).tokens.clone()
    programs.tabulate(early, caches, [late[index]])
    # its own time input counts for nothing any more
    actual = programs.selective(early, caches, active, row=1).tokens
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    other = programs.selective(early, caches, active, row=0).tokens
    assert not torch.allclose(other, expected, **TOLERANCE)


def test_a_dense_step_leaves_tables_alone():
    model, inputs = flux(batch=1)
    found = trace(model, inputs)
    caches, count = caches_of(found), len(found.analysis.selection.tabulated)
    found.programs().dense(found.flat[0], caches)
    assert all(cache.isnan().all() for cache in caches[-count:])
    assert all(len(cache) == TIMES_AT_ONCE for cache in caches[-count:])


class Shifted(Toy):
    """A shift made of time, and of more that `more` adds."""

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        x = self.embed(hidden_states)
        shift = self.o(timestep.sin()[:, None] * torch.ones(8) + self.more(x, timestep))
        x = self.attention(x + shift[:, None])
        return (self.head(x),)


@pytest.mark.parametrize(
    ("more", "linears"),
    [
        (lambda x, t: 0.0, 1),
        (lambda x, t: torch.arange(8), 1),  # a tensor made within
        (lambda x, t: torch.tensor(1.5), 1),  # a constant
        (lambda x, t: torch.histc(t, 8, 0.0, 1.0), 1),  # for which vmap has no rule
        (lambda x, t: x.mean(1), 0),
    ],
    ids=["time alone", "a range", "a constant", "one time after the other", "the latent too"],
)
def test_what_depends_on_the_latent_is_not_looked_up(more, linears):
    model, inputs = randomize(Shifted(lambda t, x: x)), toy_inputs()
    model.more = more
    found = trace(model, inputs, changed(inputs))
    targets = [node.target for node in found.analysis.selection.tabulated]
    assert targets.count(aten.linear.default) == linears
    assert (found.analysis.signature.tabulated_from is not None) == bool(linears)
    check_oracles(model, (inputs, changed(inputs)), found)


def test_tokens_that_time_moves_are_not_looked_up():
    """A table of text would be as large as many caches."""

    class TimedText(Toy):
        def forward(self, hidden_states, encoder_hidden_states, timestep):
            text = encoder_hidden_states * timestep[:, None, None]
            return super().forward(hidden_states, text, timestep)

    model, inputs = randomize(TimedText(lambda t, x: x)), toy_inputs()
    found = trace(model, inputs, changed(inputs))
    assert not any(node.meta["val"].dim() > 1 for node in found.analysis.selection.tabulated)
    check_oracles(model, (inputs, changed(inputs)), found)


def test_a_value_that_depends_on_more_is_seen_by_the_verifier():
    model, inputs = flux(batch=1)
    analysis = trace(model, inputs).analysis
    is_state = [spec.role == "parameter" for spec in analysis.signature.inputs]
    step = TimetablePass(
        lambda selection: varying_inputs(selection, is_state, None), torch_adapter.vectorized
    )
    selection = analysis.selection
    step.verify(selection, selection)
    moved = dataclasses.replace(selection.timetable, values=(selection.slots[0],))
    with pytest.raises(PassError, match="depends on more than time"):
        step.verify(selection, dataclasses.replace(selection, timetable=moved))


def test_what_cannot_be_vectorized_is_computed_as_ever():
    def refuse(*_):
        raise Unsupported("RuntimeError: vmap: called random operation")

    model, inputs = flux(batch=1)
    analysis = trace(model, inputs).analysis
    is_state = [spec.role == "parameter" for spec in analysis.signature.inputs]
    before = dataclasses.replace(analysis.selection, timetable=None, fixed=())
    step = TimetablePass(lambda selection: varying_inputs(selection, is_state, None), refuse)
    selection = step.apply(before)
    step.verify(before, selection)
    assert selection.timetable is None and selection.whole == before.whole
    assert step.summary(selection).endswith("RuntimeError: vmap: called random operation")


def test_what_vmap_refuses_is_a_reason():
    module = fx.symbolic_trace(lambda time: time + torch.rand_like(time))
    with FakeTensorMode():
        times = torch.empty(TIMES_AT_ONCE, 2)
    with pytest.raises(Unsupported, match="random"):
        torch_adapter.vectorized(module, [times], 0)


def test_a_table_serves_all_blocks():
    """PixArt's blocks add what they have learned to one projection of time."""
    case = ZOO["pixart_transformer"]()
    selection = trace(case.model, case.inputs).analysis.selection
    projections = [
        n for n in selection.tabulated if "adaln_single" in str(n.meta["nn_module_stack"])
    ]
    assert len(projections) == 2  # and the embedding itself, which the head takes
    assert len(selection.tabulated) == 2


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("sana_wm_ltx2_refiner_transformer", marks=pytest.mark.slow),
        "cosmos_video_to_world",
        pytest.param("flux_guidance", marks=pytest.mark.slow),
    ],
)
def test_tables_take_no_more_memory_than_weights(name, monkeypatch):
    """Of a time for each token, a table would take more than all caches together."""
    monkeypatch.setattr("specdiff.passes.select.timetable.MOST", 1.0)
    case = ZOO[name]()
    selection = trace(case.model, case.inputs).analysis.selection
    weights = sum(parameter.nbytes for parameter in case.model.parameters())
    assert TIMES_AT_ONCE * sum(n.meta["val"].nbytes for n in selection.tabulated) < weights
    assert bool(selection.tabulated) == (name == "flux_guidance")


@pytest.mark.parametrize("emit", [emit_timetable, emit_timetable_row])
def test_the_programs_of_tables_write_nothing_else(emit):
    model, inputs = flux(batch=1)
    found = trace(model, inputs)
    program = emit(found.analysis.module, found.analysis.selection)
    written = []
    for node in program.graph.find_nodes(op="call_function", target=aten.copy_.default):
        table = node.args[0] if emit is emit_timetable else node.args[0].args[0]
        written.append(table.name)
    assert written == [f"cache_{node.name}" for node in found.analysis.selection.tabulated]
    assert program.graph.output_node().args == ((),)


class Mixed(Toy):
    """A time of no axes in double precision, which decides no dtype until it has one."""

    def __init__(self):
        super().__init__(lambda t, x: x, text=False)
        self.time = torch.nn.Linear(16, 8)

    def forward(self, hidden_states, timestep):
        steps = torch.arange(16) / 16
        shift = self.time(torch.where(steps > 0.5, timestep, steps))
        return (self.head(self.attention(self.embed(hidden_states) + shift)),)


def test_what_has_another_dtype_for_many_times_is_not_tabulated():
    inputs = {
        "hidden_states": toy_inputs(1)["hidden_states"],
        "timestep": torch.tensor(0.7).double(),
    }
    selection = trace(randomize(Mixed()), inputs).analysis.selection
    assert selection.timetable is None
    assert "for many times" in selection.untabulated
