"""What reaches the inner compiler: no copies of caches, static inputs; its answers are right."""

from __future__ import annotations

import re
from dataclasses import astuple
from math import prod
from typing import Any

import pytest
import torch
from torch import fx
from torch._inductor.graph import GraphLowering

from specdiff import torch_adapter
from specdiff.errors import Fault
from specdiff.oracles.checks import pick, random_active
from specdiff.passes.emit.lower import LoweredPrograms
from specdiff.passes.emit.rows import emit_selective
from specdiff.runtime.streams.caches import CachePool
from tests.models import changed, flux, sd3
from tests.oracles import Traced, small_tables, trace

aten = torch.ops.aten
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
ACTIVE = 5


class Stop(Exception):
    """Raised once a test has seen what it wanted, before the C++ compiler starts."""


@pytest.fixture(scope="module")
def wide() -> Traced:
    """Many tokens, few active: no legitimate buffer of a selective step is as large as a cache."""
    model, inputs = flux(rows=12, columns=14, batch=1)
    with torch.no_grad():
        return trace(model, inputs)


def run(found: Traced, programs: LoweredPrograms, name: str) -> Any:
    """Run one program once on the first call's inputs, with fresh caches."""
    signature, flat = found.analysis.signature, found.flat[0]
    caches = [slot.allocate() for slot in signature.caches]
    active = random_active(signature.batch, signature.lengths, ACTIVE)
    with torch.no_grad():
        if name == "probe":
            return programs.probe(flat)
        if name == "dense":
            return programs.dense(flat, caches)
        return programs.selective(flat, caches, active, text=name != "textless")


def inductor_code(found: Traced, name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The wrapper code that Inductor writes for a program."""
    codes: list[str] = []

    def save(code: str) -> None:
        codes.append(code)
        raise Stop

    monkeypatch.setattr(GraphLowering, "save_output_code", staticmethod(save))
    with torch._inductor.config.patch(force_disable_caches=True), pytest.raises(Fault):
        run(found, found.programs("inductor"), name)
    assert len(codes) == 1
    return codes[0]


def allocations(code: str) -> list[int]:
    """Elements of every buffer that the code allocates."""
    shapes = re.findall(r"empty_strided_cpu\(\(([^)]*)\)", code)
    assert shapes
    return [prod(int(size) for size in shape.split(",") if size.strip()) for shape in shapes]


def executed(code: str) -> str:
    """The part of the code that runs at every call, without comments."""
    body = code.split("def call(")[1].split("return (", maxsplit=1)[0]
    return "\n".join(line.split("#")[0] for line in body.splitlines())


def smallest_cache(found: Traced) -> int:
    """Elements of the smallest that is updated in place."""
    count = len(found.analysis.selection.cached)
    return min(prod(slot.shape) for slot in found.analysis.signature.caches[:count])


@pytest.mark.parametrize("name", ["selective", pytest.param("textless", marks=pytest.mark.slow)])
def test_selective_program_allocates_nothing_of_a_caches_size(wide, name, monkeypatch):
    code = inductor_code(wide, name, monkeypatch)
    smallest = smallest_cache(wide)
    # rotary tables [N, D] are smaller than a cache [B, N, H, D] already with two heads
    assert max(allocations(code)) < smallest
    assert "copy_(" not in code
    assert "scatter" not in code
    # gathers and writes to caches are parts of generated kernels, not calls of their own
    called = set(re.findall(r"(?:torch\.ops\.aten|aten|extern_kernels)\.(\w+)", executed(code)))
    assert called == {"addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu"}
    # sizes are numbers: a symbolic program would be slower, and `allocations` could not read it
    assert not re.search(r"\bs\d+ = ", code)


def test_allocations_are_seen(wide, monkeypatch):
    """The test above can fail: a dense program does hold buffers as large as a cache."""
    code = inductor_code(wide, "dense", monkeypatch)
    assert max(allocations(code)) >= smallest_cache(wide)


def test_dense_program_reads_no_cache(wide, monkeypatch):
    """So that evaluations which leave no caches may write all of them to one and the same place."""
    code = inductor_code(wide, "dense", monkeypatch)
    signature = wide.analysis.signature
    first, count = len(signature.inputs), len(signature.caches)
    caches = {f"arg{first + index}_1" for index in range(count)}
    kinds = dict(re.findall(r"(\w+) = async_compile\.cpp_pybinding\(\[(.*?)\]", code))
    written = []
    for line in map(str.strip, executed(code).splitlines()):
        idle = line.startswith(("del ", "assert_size_stride")) or line.endswith(" = args")
        if idle or not caches.intersection(re.findall(r"\w+", line)):
            continue
        name, arguments = line.removesuffix(")").split("(", 1)
        for kind, given in zip(kinds[name].split(", "), arguments.split(", "), strict=True):
            if given in caches:
                assert kind == "'float*'", f"{name} reads {given}"
                written.append(given)
    assert sorted(written) == sorted(caches)


@pytest.mark.slow
@pytest.mark.parametrize("build", [flux, sd3])
def test_dense_program_needs_no_memory_of_its_own_for_each_cache(build):
    model, inputs = build(layers=2)
    with torch.no_grad():
        found = trace(model, inputs)
        signature, flat = found.analysis.signature, found.flat[0]
        programs, caches = found.programs("inductor"), [s.allocate() for s in signature.caches]
        # compiled for the scratch set, and run with caches
        passing = programs.dense(flat, CachePool(signature.caches).scratch())
        lasting = programs.dense(flat, caches)
        exact = found.programs("eager")
        expected = [slot.allocate() for slot in signature.caches]
        exact.dense(flat, expected)
    torch.testing.assert_close(astuple(passing), astuple(lasting), rtol=0, atol=0)
    torch.testing.assert_close(caches, expected, **TOLERANCE)
    assert programs.compile_seconds.keys() == {"dense"}


@pytest.mark.slow
def test_tables_are_neither_made_nor_gathered_block_by_block(monkeypatch):
    """Whatever the number of blocks: one gather a rotary table, and no cosine."""
    monkeypatch.setattr("specdiff.passes.select.invariant.LEAST", 0)
    gathered = []
    for layers in (1, 2):
        model, inputs = flux(layers=layers, single_layers=layers)
        with torch.no_grad(), small_tables():
            found = trace(model, inputs).analysis
        graph = emit_selective(found.module, found.selection, 8, ACTIVE).graph
        gathered.append(len(graph.find_nodes(op="call_function", target=aten.index.Tensor)))
        for function in (aten.cos.default, aten.sin.default):
            assert not graph.find_nodes(op="call_function", target=function)
    # two tables, and the rows of the latent
    assert gathered == [3, 3]


@pytest.mark.parametrize("name", ["probe", "dense", "selective", "textless"])
def test_parameters_and_caches_are_static_inputs(wide, name, monkeypatch):
    compile_fx = torch_adapter.inductor.compile_fx
    seen: list[tuple[list[Any], set[int]]] = []

    def inner(module: fx.GraphModule, values: list[Any], **settings: Any) -> Any:
        seen.append((module.graph.find_nodes(op="placeholder"), set(settings["static_input_idxs"])))
        raise Stop

    def patched(module: fx.GraphModule, values: list[Any], **settings: Any) -> Any:
        return compile_fx(module, values, inner_compile=inner, **settings)

    monkeypatch.setattr(torch_adapter.inductor, "compile_fx", patched)
    with torch._inductor.config.patch(force_disable_caches=True), pytest.raises(Fault):
        run(wide, wide.programs("inductor"), name)
    signature = wide.analysis.signature
    expected = set(signature.indices("parameter"))
    if name != "probe":
        first = len(signature.inputs)
        expected |= set(range(first, first + len(signature.caches)))
    [(placeholders, static)] = seen
    assert len(signature.indices("parameter")) > 40
    caches = 0 if name == "probe" else len(signature.caches)
    assert len(placeholders) == len(signature.inputs) + caches + (name in ("selective", "textless"))
    assert static == expected
    for node in placeholders:
        assert all(isinstance(size, int) for size in node.meta["val"].shape)


EVERY = ("dense", "selective", "tail")


@pytest.mark.parametrize(
    ("inner", "build", "handed_over"),
    [
        ("aot_eager", sd3, EVERY),
        ("inductor", flux, ("selective",)),
        ("inductor", sd3, ("dense",)),
        pytest.param("aot_eager", flux, EVERY, marks=pytest.mark.slow),
        pytest.param("inductor", flux, EVERY, marks=pytest.mark.slow),
        pytest.param("inductor", sd3, EVERY, marks=pytest.mark.slow),
    ],
)
def test_inner_backends_agree(inner, build, handed_over):
    """The programs `handed_over` to a compiler compute what all of them compute eagerly."""
    model, inputs = build(layers=1)
    with torch.no_grad():
        found = trace(model, inputs, changed(inputs))
        exact = generation(found, "eager", ())
        torch.testing.assert_close(generation(found, inner, handed_over), exact, **TOLERANCE)
        torch.testing.assert_close(exact["outputs"][0], model(**inputs)[0], **TOLERANCE)
    assert not torch.allclose(exact["selective"][0], exact["rows of dense"][0], **TOLERANCE)


def generation(found: Traced, inner: str, handed_over: tuple[str, ...]) -> dict[str, Any]:
    """A dense step, then a selective one on another input; everything they leave behind."""

    def programs(name: str) -> LoweredPrograms:
        return found.programs(inner if name in handed_over else "eager")

    signature = found.analysis.signature
    active = random_active(signature.batch, signature.lengths, ACTIVE)
    caches = [slot.allocate() for slot in signature.caches]
    before, later = found.flat
    dense = programs("dense").dense(before, caches)
    filled = [cache.clone() for cache in caches]
    selective = programs("selective").selective(later, caches, active)
    return {
        "dense": [dense.tokens, dense.importance],
        "filled": filled,
        "rows of dense": [pick(dense.tokens, active)],
        "selective": [selective.tokens, selective.importance],
        "updated": caches,
        "outputs": programs("tail").tail(before, dense.tokens),
    }


def test_programs_compile_when_first_run_and_once(wide):
    built: list[Any] = []
    programs = wide.programs()
    compiler = programs._compiler

    def counted(*arguments: Any) -> Any:
        built.append(arguments)
        return compiler(*arguments)

    programs._compiler = counted
    signature, flat = wide.analysis.signature, wide.flat[0]
    caches = [slot.allocate() for slot in signature.caches]
    assert dict(programs.compile_seconds) == {}

    def select(count: int, **wanted: bool) -> None:
        active = random_active(1, signature.lengths, count)
        found = programs.selective(flat, caches, active, **wanted)
        assert (found.importance is None) is (wanted == {"importance": False})

    expected: list[str] = []
    with torch.no_grad():
        for name, action in (
            ("probe", lambda: programs.probe(flat)),
            ("dense", lambda: programs.dense(flat, caches)),
            ("selective_5_measured", lambda: select(5)),
            ("selective_9_measured", lambda: select(9)),
            ("selective_9", lambda: select(9, importance=False)),
            ("tail", lambda: programs.tail(flat, signature.tokens.allocate())),
        ):
            action()
            action()
            expected.append(name)
            assert list(programs.compile_seconds) == expected
            assert len(built) == len(expected)
        select(5)
    assert len(built) == 6
