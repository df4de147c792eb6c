"""Quantised linears: one op on rows, whatever their weights are made of."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import specdiff
from specdiff.quantized import ONE_SCALE, quantized_weights
from tests.models import flux
from tests.oracles import small_tables


@dataclass(frozen=True)
class PerRow:
    """A scale for each token."""


@dataclass(frozen=True)
class PerTensor:
    """One for all."""


@dataclass
class Kwargs:
    granularity: Any


class Weight(Tensor):
    """As torchao's: bytes and scales, which answer a linear and few other ops."""

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor, act_quant_kwargs: Any = None) -> Any:
        return Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype)

    def __init__(self, data: Tensor, scale: Tensor, act_quant_kwargs: Any = None) -> None:
        self.data_, self.scale, self.act_quant_kwargs = data, scale, act_quant_kwargs

    def __tensor_flatten__(self) -> Any:
        return ["data_", "scale"], self.act_quant_kwargs

    @classmethod
    def __tensor_unflatten__(cls, parts: Any, kwargs: Any, size: Any, stride: Any) -> Any:
        return cls(parts["data_"], parts["scale"], kwargs)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function is functional.linear:
            x, weight, *bias = args
            with torch._C.DisableTorchFunctionSubclass():
                return functional.linear(x, weight.data_.to(x.dtype) * weight.scale, *bias)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function is torch.ops.aten.detach.default:
            weight = args[0]
            return cls(weight.data_, weight.scale, weight.act_quant_kwargs)
        raise NotImplementedError(f"{function} of a quantised weight")


Weight.__module__ = "torchao.a_double"


def quantized(model: nn.Module, granularity: Any = None) -> nn.Module:
    """All linears of the blocks in int8, a scale for each channel."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "blocks" in name:
            scale = module.weight.detach().abs().amax(1, keepdim=True) / 127
            data = (module.weight.detach() / scale).round().to(torch.int8)
            kwargs = granularity and Kwargs(granularity)
            module.weight = nn.Parameter(Weight(data, scale, kwargs), requires_grad=False)
    return model


@pytest.mark.parametrize("granularity", [None, PerRow()])
def test_verified(granularity):
    model, inputs = flux(layers=1, single_layers=0)
    model = quantized(model, granularity)
    with small_tables():
        verification = specdiff.verify(model, **inputs)
    assert verification.passed and verification.selective, str(verification)
    report = verification.graphs[0].report
    assert any(region.kind == "modulation" for region in report.regions)
    assert report.analysis.selection.timetable is not None  # vmap took its linears whole


def test_one_scale_for_all_tokens_is_a_reason():
    model, inputs = flux(layers=1, single_layers=0)
    report = specdiff.explain(quantized(model, PerTensor()), **inputs)
    assert (report.no_step_plan, report.reason) == ("", ONE_SCALE)


def graph_of(function: Any, *inputs: Any) -> Any:
    graphs = []
    torch._dynamo.reset()
    torch.compile(function, backend=lambda graph, _: graphs.append(graph) or graph.forward)(*inputs)
    return graphs[0]


def weight() -> Weight:
    return Weight(torch.ones(4, 3, dtype=torch.int8), torch.ones(4, 1))


def test_weights_are_found_by_their_use():
    x = torch.randn(2, 3)
    graph = graph_of(functional.linear, x, torch.ones(4, 3))
    assert quantized_weights(graph, [x, torch.ones(4, 3)]) == ()
    assert quantized_weights(graph, [x, weight()]) == (1,)
    graph = graph_of(lambda x, w: functional.linear(x, w) + w.sum(), x, torch.ones(4, 3))
    with pytest.raises(specdiff.errors.Unsupported, match="no linear's"):
        quantized_weights(graph, [x, weight()])
