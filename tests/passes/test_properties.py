"""Random token programs by the oracles: what is rewritten agrees with the model, all of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, seed, settings
from torch import fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from specdiff.errors import Unsupported
from specdiff.oracles import checks as oracles
from specdiff.oracles.checks import Pair, random_active
from tests.models import changed
from tests.oracles import Traced, analyse_graph, trace
from tests.passes.programs import Block, Spec, build, inputs_of, specs

TOLERANCE = 1e-7
SEED = 2026
NAMES = re.compile(r"\b[a-z_]+_\d+\b|\b(add|cat|clone|linear|mul|sub)\b")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def graph_of(model: nn.Module, *calls: dict[str, Any]) -> tuple[fx.GraphModule, list[list[Any]]]:
    """What Dynamo would give for `model`, in a tenth of the time, and the flat inputs of `calls`.

    Weights are inputs, those that are not read are left out, and every input names its source.
    """
    weights = dict(model.named_parameters())
    names = [*weights, *calls[0]]

    def function(*values: Any) -> Any:
        named = dict(zip(names, values, strict=True))
        inputs = {name: named.pop(name) for name in calls[0]}
        return functional_call(model, named, kwargs=inputs)

    values = [*weights.values(), *calls[0].values()]
    module = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*values)
    module.graph.eliminate_dead_code()
    for node in module.graph.nodes:
        node.meta.clear()  # values of another fake mode than the export's
    kept = []
    for name, node in zip(names, module.graph.find_nodes(op="placeholder"), strict=True):
        if name in weights and not node.users:
            module.graph.erase_node(node)
            continue
        node._dynamo_source = SimpleNamespace(name=f"L['{name}']")
        kept.append(name)
    module.recompile()
    return module, [[{**weights, **call}[name] for name in kept] for call in calls]


def traced_without_dynamo(model: nn.Module, *calls: dict[str, Any]) -> Traced:
    module, flat = graph_of(model, *calls)
    return Traced(analyse_graph(module, flat[0]), flat)


def pairs(model: nn.Module, found: Traced, later: dict[str, Any]) -> Iterator[Pair]:
    """Oracles 1 to 3, the first two with one active set each, with text computed and without."""
    programs, flat = found.programs(), found.flat
    signature = found.analysis.signature
    count = max(len(signature.lengths), round(0.4 * signature.prunable_tokens))
    active = random_active(signature.batch, signature.lengths, count)
    yield from oracles.idempotence(found.analysis, programs, flat[0], active)
    yield from oracles.masked_dense(found.analysis, programs, *flat, active)
    yield from oracles.without_text(found.analysis, programs, *flat, active)
    yield from oracles.all_active(found.analysis, programs, *flat, model(**later))


def check(spec: Spec, tracer: Callable[..., Traced] = traced_without_dynamo) -> str:
    """Hold one program to the oracles; what became of it."""
    model, inputs = build(spec), inputs_of(spec)
    later = changed(inputs)
    try:
        found = tracer(model, inputs, later)
    except Unsupported as error:
        return f"refused: {NAMES.sub('_', str(error))}"
    for pair in pairs(model, found, later):
        assert pair.error <= TOLERANCE, f"{pair.oracle}: error {pair.error:.1e}"
    return "rewritten"


def hold(examples: int, number: int) -> Counter[str]:
    """Hold this many random programs to the oracles; how often each thing became of them."""
    counts: Counter[str] = Counter()

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(specs())
    def run(spec: Spec) -> None:
        outcome = check(spec)
        event(outcome)
        counts[outcome] += 1

    run()
    # or the property would hold of a compiler that refuses everything
    assert counts["rewritten"] >= examples / 2, counts
    return counts


def test_random_programs_by_the_oracles():
    hold(15, number=0)


@pytest.mark.slow
def test_many_random_programs_by_the_oracles():
    counts = hold(1000, SEED)
    print(f"\nseed {SEED}: {counts.total()} programs")
    for outcome, count in counts.most_common():
        print(f"{count:5} {outcome}")


THROUGH_DYNAMO = (
    Block("joint attention", a=1, b=2),
    Block("written", a=0, b=3),
    Block("complex pairs", a=1),
    Block("windows", a=2, b=1),
    Block("rejoined pieces", a=1, b=1),
    Block("wrapped", a=3, b=1),
)


@pytest.mark.parametrize("block", THROUGH_DYNAMO, ids=lambda block: block.kind)
def test_programs_through_dynamo(block):
    blocks = (Block("joint attention", a=3), block, Block("rope attention"))
    spec = Spec(2, 6, 3, 8, blocks, "image")
    assert check(spec, trace) == check(spec) == "rewritten"


FOUND = {
    "a view of a value that the masked dense oracle has mixed with its cache": Spec(
        3,
        9,
        4,
        4,
        (
            Block("joint attention", a=3, b=6),
            Block("merged samples", a=6),
            Block("shift", text=True, a=22),
            Block("merged samples", residual=False, a=43),
            Block("picked", residual=False, a=22, b=43),
        ),
        "image",
    ),
    "an allocation that is written in two halves": Spec(
        1,
        4,
        1,
        4,
        (
            Block("self attention", residual=False),
            Block("linear", residual=False),
            Block("written both halves", residual=False, a=1),
        ),
    ),
    "an attention of each token, over its heads": Spec(
        1, 4, 1, 4, (Block("self attention"), Block("wrapped", residual=False, a=1, b=662))
    ),
    "a join of text that is read whole, in a step without text": Spec(
        1,
        6,
        1,
        4,
        (
            Block("joint step", residual=False),
            Block("joint step", residual=False, b=201),
            Block("cross attention", residual=False, a=272, b=128),
            Block("linear", residual=False),
            Block("overlapping sums", residual=False),
            Block("linear", residual=False),
        ),
    ),
    "complex pairs of tokens of a value out of a cache": Spec(
        2, 6, 3, 8, (Block("joint attention", a=3), Block("complex pairs", a=3), Block("linear"))
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_programs_that_once_failed(name):
    assert check(FOUND[name]) == "rewritten"
