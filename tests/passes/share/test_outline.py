"""Blocks that repeat are compiled once: the same results, found wherever blocks are alike."""

from __future__ import annotations

import ast
import itertools
import operator
import re
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from torch import fx
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering

from specdiff import compiler, torch_adapter
from specdiff.options import Options
from specdiff.oracles.checks import random_active
from specdiff.passes.emit.rows import emit_selective
from specdiff.passes.emit.whole import emit_dense, emit_probe
from specdiff.passes.emit.without_text import emit_without_text
from specdiff.passes.share.outline import Shared, share_repeats
from specdiff.passes.share.repeats import find_repeats
from tests.models import changed, flux, sd3
from tests.oracles import Traced, small_tables, trace

aten = torch.ops.aten
ACTIVE, SAMPLE = 5, 16
"""The sample is smaller than the attentions, so that each block samples rows of its own."""
PROGRAMS = ("dense", "selective", "unmeasured", "textless")
QUICK = [
    ("flux_of_blocks", "selective"),
    ("sd3_of_blocks", "dense"),
    ("unequal_blocks", "textless"),
]
"""Unmeasured: selective without importance."""


def traced(build: Any, **sizes: Any) -> Traced:
    model, inputs = build(batch=1, **sizes)
    with torch.no_grad(), small_tables():
        return trace(model, inputs, changed(inputs))


@pytest.fixture(scope="module")
def flux_of_blocks() -> Traced:
    return traced(flux, layers=4, single_layers=5, rows=12, columns=14)


@pytest.fixture(scope="module")
def sd3_of_blocks() -> Traced:
    return traced(sd3, layers=6, text=6)


@pytest.fixture(scope="module")
def unequal_blocks() -> Traced:
    """The first blocks have a second attention."""
    return traced(sd3, layers=9, dual=(0, 1, 2, 3))


def emitted(found: Traced, name: str) -> fx.GraphModule:
    module, selection = found.analysis.module, found.analysis.selection
    if name == "probe":
        return emit_probe(module, selection)
    if name == "dense":
        return emit_dense(module, selection, SAMPLE)
    emit = emit_without_text if name == "textless" else emit_selective
    return emit(module, selection, 0 if name == "unmeasured" else SAMPLE, ACTIVE)


def values_of(found: Traced, name: str) -> list[Any]:
    """Inputs of a program, its caches filled with what differs from one to the next."""
    generator = torch.Generator().manual_seed(0)
    signature = found.analysis.signature
    caches = [slot.allocate() for slot in signature.caches]
    for cache in caches:
        cache.copy_(torch.randn(cache.shape, generator=generator))
    if name == "probe":
        return list(found.flat[1])
    active = random_active(signature.batch, signature.lengths, ACTIVE)
    row = [torch.tensor([3])] if found.analysis.selection.tabulated else []
    return [*found.flat[1], *caches, *([] if name == "dense" else [active, *row])]


def shared(program: fx.GraphModule) -> tuple[fx.GraphModule, list[Shared]]:
    return share_repeats(program, torch_adapter.SHARED_CALL)


def everything(run: Any, found: Traced, name: str) -> list[torch.Tensor]:
    """What a program returns and leaves in its caches."""
    values = values_of(found, name)
    first = len(found.analysis.signature.inputs)
    with torch.no_grad():
        outputs = run(values)
    return [*outputs, *values[first : first + len(found.analysis.signature.caches)]]


@pytest.mark.parametrize(
    ("which", "name"),
    [
        case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(
            ("flux_of_blocks", "sd3_of_blocks", "unequal_blocks"), ("probe", *PROGRAMS)
        )
    ],
)
def test_a_shared_program_computes_the_same_to_the_bit(which, name, request):
    found = request.getfixturevalue(which)
    plain = emitted(found, name)
    program, graphs = shared(plain)
    assert graphs
    expected = everything(lambda values: plain(*values), found, name)
    got = everything(lambda values: program(*values), found, name)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    names = [node.name for node in plain.graph.find_nodes(op="placeholder")]
    assert [node.name for node in program.graph.find_nodes(op="placeholder")] == names


@pytest.mark.parametrize("name", PROGRAMS)
def test_nearly_all_blocks_of_a_kind_are_shared(flux_of_blocks, sd3_of_blocks, name):
    """A border lies inside a block, where it costs least: one block of a kind is not whole."""
    assert sorted(s.copies for s in shared(emitted(flux_of_blocks, name))[1]) == [3, 4]
    # the last block of SD3 computes no text, and no block does in the frozen program
    expected = 5 if name == "textless" else 4
    assert [s.copies for s in shared(emitted(sd3_of_blocks, name))[1]] == [expected]


class Stop(Exception):
    """Raised once a test has seen what it wanted, before the C++ compiler starts."""


def code_of(found: Traced, name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The code that Inductor writes for a shared program, which is not run."""
    codes: list[str] = []

    def save(code: str) -> None:
        codes.append(code)
        raise Stop

    program, graphs = shared(emitted(found, name))
    assert len(graphs) == 2
    monkeypatch.setattr(GraphLowering, "save_output_code", staticmethod(save))
    with (
        torch._inductor.config.patch(force_disable_caches=True),
        pytest.raises((Stop, InductorError)),
    ):
        torch_adapter.compile_program(program, values_of(found, name), "inductor", {})
    assert len(codes) == 1
    return codes[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "selective"])
def test_what_is_compiled_does_not_grow_with_depth(name, monkeypatch):
    """Two functions, one for each kind of block, and as many kernels for more blocks."""
    kernels = []
    for layers in (5, 8):
        found = traced(flux, layers=layers, single_layers=layers, rows=12, columns=14)
        code = code_of(found, name, monkeypatch)
        assert len(re.findall(r"^def \w*subgraph\w*\(", code, re.MULTILINE)) == 2
        kernels.append(len(re.findall(r"^\w+ = async_compile", code, re.MULTILINE)))
    # blocks that are left as they are sample other rows in deeper models: they may fuse otherwise
    assert abs(kernels[0] - kernels[1]) <= 1


def executed(code: str) -> str:
    """The part of the code that runs at every call."""
    return code.split("def call(")[1].split("return (", maxsplit=1)[0]


def uses(code: str, name: str) -> list[str]:
    """The lines that do something with a value."""
    idle = ("del ", "assert_size_stride")
    lines = [line.strip() for line in code.splitlines() if re.search(rf"\b{name}\b", line)]
    return [n for n in lines if not n.startswith(idle) and not n.endswith("= args")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        name if name == "selective" else pytest.param(name, marks=pytest.mark.slow)
        for name in PROGRAMS
    ],
)
def test_inductor_copies_no_cache(flux_of_blocks, name, monkeypatch):
    found = flux_of_blocks
    code = code_of(found, name, monkeypatch)
    tables = 0 if name == "textless" else 2
    first, count = (
        len(found.analysis.signature.inputs) + tables,
        len(found.analysis.selection.cached),
    )
    written = 0
    bodies, main = code.split("def call(")[0], executed(code)
    for function, given in re.findall(r"(\w+)_args = \[(.*)\]", main):
        body = bodies.split(f"def {function}(args):")[1].split("return (")[0]
        names = body.split(" = args")[0].strip().split(", ")
        values = [ast.unparse(each) for each in ast.parse(f"[{given}]", mode="eval").body.elts]
        for own, value in zip(names, values, strict=True):
            number = int(value[3:-2]) if re.fullmatch(r"arg\d+_1", value) else -1
            if first <= number < first + count:
                # a call takes the cache itself, and a dense one does nothing but write it once
                assert len(uses(main, value)) == 1
                assert len(uses(body, own)) == 1 or name != "dense"
                written += 1
    assert written == 2 * (3 + 4)
    if name != "dense":
        smallest = min(prod(slot.shape) for slot in found.analysis.signature.caches[:count])
        shapes = re.findall(r"empty_strided_cpu\(\(([^)]*)\)", code)
        assert shapes
        assert all(prod(int(n) for n in s.split(",") if n.strip()) < smallest for s in shapes)


@pytest.mark.parametrize("name", ["dense", pytest.param("selective", marks=pytest.mark.slow)])
def test_inductor_computes_what_the_program_says(flux_of_blocks, name):
    plain = emitted(flux_of_blocks, name)
    expected = everything(lambda values: plain(*values), flux_of_blocks, name)

    def run(values: list[Any]) -> Any:
        return torch_adapter.compile_program(shared(plain)[0], values, "inductor", {})(values)

    got = everything(run, flux_of_blocks, name)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_backend_shares_what_it_hands_to_inductor(flux_of_blocks, monkeypatch):
    handed: list[fx.GraphModule] = []

    def note(program: fx.GraphModule, *_: Any) -> Any:
        handed.append(program)
        return lambda values: ()

    monkeypatch.setattr(torch_adapter, "compile_program", note)
    options = Options()
    for inner, calls in (("inductor", 7), ("eager", 0)):
        run = compiler.program_compiler(None, replace(options, inner_backend=inner), {})
        program = emitted(flux_of_blocks, "dense")
        program.meta["record"] = None
        run("dense", program, [])
        assert len(calls_in(handed[-1])) == calls


def calls_in(program: fx.GraphModule) -> list[fx.Node]:
    return program.graph.find_nodes(op="call_function", target=torch_adapter.SHARED_CALL)


class Writer:
    """A program of equal blocks, written by hand."""

    def __init__(self, blocks: int) -> None:
        self.graph = fx.Graph()
        self.value = self.placeholder("x", 8, 8)
        self.weights = [self.placeholder(f"w{i}", 8, 8) for i in range(blocks)]
        self.caches = [self.placeholder(f"c{i}", 8, 8) for i in range(blocks)]

    def placeholder(self, name: str, *shape: int) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = torch.empty(shape, device="meta")
        return node

    def call(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        return node

    def block(self, i: int, factor: float = 2.0) -> fx.Node:
        """Twenty nodes; returns what its cache holds afterwards, an alias of it."""
        value = self.call(aten.linear.default, self.value, self.weights[i])
        for _ in range(8):
            value = self.call(aten.sin.default, self.call(aten.mul.Tensor, value, factor))
        written = self.call(aten.copy_.default, self.caches[i], value)
        kept = self.call(aten.mul.Tensor, written, 1.0)
        self.value = self.call(aten.add.Tensor, kept, self.value)
        return written

    def finish(self, *more: fx.Node, constants: dict[str, Any] | None = None) -> fx.GraphModule:
        self.graph.output((self.value, *more))
        return fx.GraphModule(constants or {}, self.graph)


def test_a_program_that_cannot_be_compiled_with_calls_is_compiled_without(
    flux_of_blocks, monkeypatch, caplog
):
    handed: list[fx.GraphModule] = []

    def refuse_calls(program: fx.GraphModule, *_: Any) -> Any:
        handed.append(program)
        if calls_in(program):
            raise NotImplementedError("invoke_subgraph")
        return lambda values: ()

    monkeypatch.setattr(torch_adapter, "compile_program", refuse_calls)
    program = emitted(flux_of_blocks, "dense")
    program.meta["record"] = None
    with caplog.at_level("INFO", logger="specdiff"):
        compiler.program_compiler(None, Options(), {})("dense", program, [])
    assert handed[-1] is program and len(handed) == 2
    assert "invoke_subgraph" in caplog.text


def same(program: fx.GraphModule) -> bool:
    """Whether sharing, of which there is some, changes nothing."""
    changed, graphs = shared(program)
    assert graphs
    generator = torch.Generator().manual_seed(0)
    values = [
        torch.randn(node.meta["val"].shape, generator=generator)
        for node in program.graph.find_nodes(op="placeholder")
    ]
    found = [each(*[v.clone() for v in values])[0] for each in (program, changed)]
    return torch.equal(*found)


def test_constants_of_a_program_are_kept():
    writer = Writer(5)
    table = writer.graph.get_attr("table")
    table.meta["val"] = torch.empty(8, 8, device="meta")
    for i in range(5):
        writer.block(i)
        writer.value = writer.call(aten.add.Tensor, writer.value, table)
    assert same(writer.finish(constants={"table": torch.full((8, 8), 0.5)}))


@pytest.mark.parametrize("one", range(5))
def test_what_is_one_value_in_one_block_may_be_two_in_another(one):
    writer = Writer(5)
    others = [writer.placeholder(f"other_{i}", 8, 8) for i in range(5)]
    for i in range(5):
        total = writer.call(aten.add.Tensor, others[i], others[one])
        writer.block(i)
        writer.value = writer.call(aten.add.Tensor, writer.value, total)
    assert same(writer.finish())


def test_blocks_of_other_constants_are_not_alike():
    writer = Writer(6)
    for i in range(6):
        writer.block(i, 2.0 if i < 3 else 2)
    copies = find_repeats(writer.finish().graph)
    targets = [{n.args[1] for copy in each for n in copy if n.args[1:] == (2,)} for each in copies]
    assert all(len({type(factor) for factor in found}) <= 1 for found in targets)


def test_two_copies_are_too_few():
    writer = Writer(2)
    for i in range(2):
        writer.block(i)
    program = writer.finish()
    assert shared(program) == (program, [])


def test_a_cache_that_others_read_is_not_written_in_a_call():
    """A call gives back memory of its own, and Inductor does not see that it writes."""
    for leak in (False, True):
        writer = Writer(5)
        written = [writer.block(i) for i in range(5)]
        program, graphs = shared(writer.finish(*(written[1:4] if leak else ())))
        assert bool(graphs) is not leak
        assert bool(calls_in(program)) is not leak
        reader = Writer(5)
        for i in range(5):
            reader.block(i)
        seen = [reader.call(aten.neg.default, cache) for cache in reader.caches] if leak else []
        program, graphs = shared(reader.finish(*seen))
        assert bool(graphs) is not leak


def test_the_program_it_is_given_stays_as_it_was(flux_of_blocks):
    plain = emitted(flux_of_blocks, "selective")
    before = [str(node) for node in plain.graph.nodes]
    shared(plain)
    assert [str(node) for node in plain.graph.nodes] == before
    assert not plain.graph.find_nodes(op="call_function", target=operator.getitem)
