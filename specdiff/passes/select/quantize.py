"""Quantize: store keys and values as 8-bit codes (`select.cache_layout`); no other cache.

Attention averages over many keys and values, which hides their rounding. Other caches, such as the
inputs of a convolution or the outputs of a block, are part of the residual stream, where rounding
would add up.

    before                                 after
    cache_k = index_put(cache_k, rows)     codes, scale = index_put(both, encode(rows))
    attention(q, cache_k, ...)             attention(q, codes * scale, ...)
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

import torch
from torch import fx

from specdiff.passes.base import Pass, PassError
from specdiff.passes.rules.attention import reads
from specdiff.passes.rules.registry import rank_of, shape_of
from specdiff.passes.select.cache_layout import SCALE, stored_tensors
from specdiff.passes.select.selection import Selection

FLOAT8_CAPABILITY = (8, 9)
"""The first CUDA devices for which Triton converts to and from float8_e4m3fn."""


class QuantizePass(Pass[Selection, Selection]):
    """Makes key and value caches hold codes of this dtype, where they can."""

    name = "quantize"

    def __init__(self, code: torch.dtype) -> None:
        self._code = code

    def apply(self, value: Selection) -> Selection:
        """The same selection with `codes`."""
        return quantized(value, self._code)

    def verify(self, value: Selection, result: Selection) -> None:
        """Check that codes take less memory than the values they stand for."""
        for node, tensors in stored_tensors(result).items():
            held = sum(t.dtype.itemsize * torch.Size(t.shape).numel() for t in tensors)
            if node in result.codes and held >= node.meta["val"].nbytes:
                raise PassError(f"the codes of {node.name} take more memory than it does")

    def summary(self, result: Selection) -> str:
        """How many caches hold codes, and why the others do not."""
        reasons = Counter(uncoded(result, self._code).values())
        others = "".join(f"; {count} as they are: {why}" for why, count in reasons.items())
        return f"{len(result.codes)} of {len(result.cached)} caches as {self._code}{others}"

    def notes(self, result: Selection) -> Mapping[fx.Node, str]:
        """The dtype of each cache, or why it holds no codes."""
        return {**dict.fromkeys(result.codes, str(self._code)), **uncoded(result, self._code)}


def quantized(selection: Selection, code: torch.dtype | None) -> Selection:
    """The selection with codes of that dtype in every cache that can hold them."""
    if code is None:
        return selection
    reasons = uncoded(selection, code)
    codes = {node: code for node in selection.cached if node not in reasons}
    return dataclasses.replace(selection, codes=codes)


def uncoded(selection: Selection, code: torch.dtype) -> dict[fx.Node, str]:
    """The caches that stay in the model's dtype, each with the reason."""
    reasons = ((node, why_uncoded(selection, node, code)) for node in selection.cached)
    return {node: reason for node, reason in reasons if reason is not None}


def why_uncoded(selection: Selection, node: fx.Node, code: torch.dtype) -> str | None:
    """Why a cache cannot hold codes, or None if it can."""
    value: torch.Tensor = node.meta["val"]
    if not all(reads(user, node) for user in node.users):
        return "it is not the key or value of attentions alone"
    if not value.dtype.is_floating_point:
        return f"it holds {value.dtype}"
    if selection.cache_order(node)[-1] != rank_of(node) - 1 or rank_of(node) < 3:
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
