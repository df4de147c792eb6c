"""Normalize: tuples become slices, equal expressions one, and nothing random is shared."""

from __future__ import annotations

import operator

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from specdiff import torch_adapter
from specdiff.errors import Unsupported
from specdiff.passes.base import PassError
from specdiff.passes.normalize.normalize import (
    DynamoGraph,
    NormalizePass,
    replace_tuples,
    share_equal_nodes,
)

aten = torch.ops.aten


def graph_of(function, *inputs):
    with torch.no_grad():
        return make_fx(function, pre_dispatch=True, tracing_mode="fake")(*inputs)


def normalized(function, *inputs, **compile_options):
    """The result of the pass on the Dynamo graph of `function`."""
    results = []

    def backend(module, values):
        step, value = NormalizePass(torch_adapter.export_functional), DynamoGraph(module, values)
        results.append(step.apply(value))
        step.verify(value, results[0])
        return module.forward

    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True, **compile_options)(*inputs)
    return results[0]


def count(module, target) -> int:
    return len(module.graph.find_nodes(op="call_function", target=target))


def test_equal_expressions_are_computed_once():
    module = graph_of(lambda x: x.sin() + x.sin() * x.cos(), torch.ones(3))
    share_equal_nodes(module.graph)
    assert (count(module, aten.sin.default), count(module, aten.cos.default)) == (1, 1)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.rand_like(x) - torch.rand_like(x),
        lambda x: torch.nn.functional.dropout(x, 0.5) - torch.nn.functional.dropout(x, 0.5),
    ],
    ids=["rand_like", "dropout"],
)
def test_random_expressions_are_not(function):
    module = graph_of(function, torch.ones(64))
    before = len(module.graph.nodes)
    share_equal_nodes(module.graph)
    assert len(module.graph.nodes) == before


def test_numbers_that_are_equal_to_python_alone_are_not():
    """1 and 1.0 give other dtypes."""
    x = torch.ones(3, dtype=torch.int64)
    module = graph_of(lambda x: ((x * 1), (x * 1.0), (x * True)), x)
    share_equal_nodes(module.graph)
    assert count(module, aten.mul.Tensor) == 3


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.split(4, 1),
        lambda x: x.split([1, 7, 2], -1),
        lambda x: x.chunk(3, 1),
        lambda x: x.tensor_split(4, 1),
        lambda x: x.tensor_split((2, 5), -1),
        lambda x: x.unbind(0),
        lambda x: x.unbind(-1),
    ],
    ids=["split", "sizes", "chunk", "sections", "indices", "unbind", "unbind last"],
)
def test_tuples_become_slices_and_selects(function):
    x = torch.randn(3, 10)
    module = graph_of(function, x)
    replace_tuples(module.graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    assert count(module, operator.getitem) == 0
    for got, expected in zip(module(x), function(x), strict=True):
        torch.testing.assert_close(got, expected)


def test_constants_of_the_graph_stay_its_own():
    module = normalized(lambda x: x * torch.tensor([1.0, 2.0, 3.0]), torch.ones(2, 3))
    assert len(module.graph.find_nodes(op="placeholder")) == 1
    torch.testing.assert_close(module(torch.ones(2, 3))[0][1], torch.tensor([1.0, 2.0, 3.0]))


def test_writes_to_what_is_computed_become_functional():
    def model(x):
        y = x * 2
        y[:, 0] = 0
        return y.add_(1)

    x = torch.randn(2, 3)
    module = normalized(model, x)
    torch.testing.assert_close(module(x)[0], model(x))


def test_writes_that_fill_an_allocation_are_one_join():
    """What was allocated is gone, and with it what no two runs have in common."""

    def model(x):
        y = torch.empty_like(x)
        y[:, :2] = x[:, :2].sin()
        y[:, 2:] = x[:, 2:].cos().half()
        y[:, 1:2] = x[0, 0]
        return y

    x = torch.randn(2, 5, 3)
    module = normalized(model, x)
    torch.testing.assert_close(module(x)[0], model(x))
    assert count(module, torch.ops.aten.cat.default) == 1
    assert not any("empty" in n.name or "zeros" in n.name for n in module.graph.nodes)


def test_what_no_write_fills_is_zero():
    def model(x):
        y = torch.empty_like(x)
        y[:, ::2] = x[:, ::2]
        return y

    x = torch.randn(2, 5, 3)
    assert (normalized(model, x)(x)[0][:, 1::2] == 0).all()


def test_sources_are_kept():
    def model(first, second):
        return first + second

    module = normalized(model, torch.ones(2), torch.ones(2))
    sources = [n.meta["source"] for n in module.graph.find_nodes(op="placeholder")]
    assert sources == ["L['first']", "L['second']"]


@pytest.mark.parametrize(
    ("function", "options", "reason"),
    [
        (lambda x: x.add_(1), {}, "writes to one of its inputs"),
        (lambda x: x[:, :1].mul_(2) + 1, {}, "writes to one of its inputs"),
        (lambda x: x + torch.randn(3), {}, "draws random numbers"),
        (lambda x: x.bernoulli(), {}, "draws random numbers"),
        (lambda x: x.as_strided((3, 2), (1, 3)), {}, "by strides"),
    ],
    ids=["write", "write to a view", "randn", "bernoulli", "strides"],
)
def test_what_is_refused(function, options, reason):
    with pytest.raises(Exception, match=reason) as caught:
        normalized(function, torch.rand(2, 3), **options)
    assert isinstance(caught.value.__cause__ or caught.value.inner_exception, Unsupported)


def test_verify_names_a_mutating_op():
    step = NormalizePass(torch_adapter.export_functional)
    module = graph_of(lambda x: x.sin(), torch.ones(2))
    *_, sin, _ = module.graph.nodes
    sin.target = aten.sin_.default
    with pytest.raises(PassError, match="mutates its input"):
        step.verify(DynamoGraph(module, [torch.ones(2)]), module)
    with pytest.raises(PassError, match="number of inputs"):
        step.verify(DynamoGraph(module, []), module)


def test_what_is_taken_from_another_value_is_said():
    """A device, too: a table on the CPU in the form of a value on a GPU."""
    module = normalized(lambda x, y: x.type_as(y) + y, torch.ones(2), torch.ones(2).double())
    (copied,) = module.graph.find_nodes(op="call_function", target=aten._to_copy.default)
    assert copied.kwargs == {"dtype": torch.float64, "device": torch.device("cpu")}
    assert not count(module, aten.type_as.default)


def test_a_permutation_written_as_einsum_is_one():
    def model(x):
        return torch.einsum("nhwpqc->nchpwq", x) + torch.einsum("ab->a", x[0, 0, 0, 0]).sum()

    x = torch.randn(2, 3, 4, 2, 2, 5)
    module = normalized(model, x)
    torch.testing.assert_close(module(x)[0], model(x))
    assert count(module, torch.ops.aten.permute.default) == 1
    assert count(module, torch.ops.aten.einsum.default) == 1
