"""Quantize: which caches hold 8-bit codes (`plan.cache_layout`): keys and values, no others.

Attention averages over many keys and values, which forgives their rounding. Whatever else lives in
caches, such as the inputs of a convolution or the outputs of a block, is the model's trunk.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

import torch
from torch import fx

from specdiff.passes.base import Pass, PassError
from specdiff.passes.plan.cache_layout import SCALE, kept_tensors
from specdiff.passes.plan.selective_plan import SelectivePlan
from specdiff.passes.rules.attention import reads
from specdiff.passes.rules.registry import rank_of, shape_of

FLOAT8_CAPABILITY = (8, 9)
"""The first CUDA devices for which Triton converts to and from float8_e4m3fn."""


class QuantizePass(Pass[SelectivePlan, SelectivePlan]):
    """A plan whose key/value caches hold codes of this dtype, where they can."""

    name = "quantize"

    def __init__(self, code: torch.dtype) -> None:
        self._code = code

    def apply(self, value: SelectivePlan) -> SelectivePlan:
        """The same plan with `codes`."""
        return quantized(value, self._code)

    def verify(self, value: SelectivePlan, result: SelectivePlan) -> None:
        """Codes take less memory than what they stand for."""
        for node, tensors in kept_tensors(result).items():
            held = sum(t.dtype.itemsize * torch.Size(t.shape).numel() for t in tensors)
            if node in result.codes and held >= node.meta["val"].nbytes:
                raise PassError(f"the codes of {node.name} take more memory than it does")

    def summary(self, result: SelectivePlan) -> str:
        """How many caches hold codes, and why the others do not."""
        reasons = Counter(uncoded(result, self._code).values())
        kept = "".join(f"; {count} as they are: {why}" for why, count in reasons.items())
        return f"{len(result.codes)} of {len(result.cached)} caches as {self._code}{kept}"

    def notes(self, result: SelectivePlan) -> Mapping[fx.Node, str]:
        """The form of each cache."""
        return {**dict.fromkeys(result.codes, str(self._code)), **uncoded(result, self._code)}


def quantized(plan: SelectivePlan, code: torch.dtype | None) -> SelectivePlan:
    """The plan with codes of that dtype wherever there is no reason against them."""
    if code is None:
        return plan
    reasons = uncoded(plan, code)
    codes = {node: code for node in plan.cached if node not in reasons}
    return dataclasses.replace(plan, codes=codes)


def uncoded(plan: SelectivePlan, code: torch.dtype) -> dict[fx.Node, str]:
    """The caches that stay in the model's dtype, each with the reason."""
    found = ((node, why_uncoded(plan, node, code)) for node in plan.cached)
    return {node: reason for node, reason in found if reason is not None}


def why_uncoded(plan: SelectivePlan, node: fx.Node, code: torch.dtype) -> str | None:
    """What keeps a cache from holding codes, or None if nothing does."""
    value: torch.Tensor = node.meta["val"]
    if not all(reads(user, node) for user in node.users):
        return "it is not the key or value of attentions alone"
    if not value.dtype.is_floating_point:
        return f"it holds {value.dtype}"
    if plan.cache_order(node)[-1] != rank_of(node) - 1 or rank_of(node) < 3:
        return "its last axis is not the width of a head"
    width = shape_of(node)[-1]
    if width * code.itemsize + SCALE.itemsize >= width * value.dtype.itemsize:
        return "codes and scales would take as much memory"
    return _unsupported(value.device, code)


def _unsupported(device: torch.device, code: torch.dtype) -> str | None:
    nvidia = device.type == "cuda" and torch.version.hip is None
    if not (nvidia and code.is_floating_point):
        return None
    old = torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY
    return f"{torch.cuda.get_device_name(device)} has no {code}" if old else None
