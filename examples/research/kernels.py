"""Kernels that decide a selective step on a GPU: few queries, many keys, few rows of linears.

    python examples/research/kernels.py

Medians of microseconds, the cache of the device flushed before each run. "keys in P parts" is flash
decoding by PyTorch's own flash kernel and a compiled merge; "as a sum" is a linear layer written as
`(x * w).sum(-1)`, compiled. Both were tried in the compiler and lose (examples/bench/h100).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
PARTS = (2, 3, 4, 6)
SAMPLES = (512, 256, 128, 64, 32)
LINEARS = ((1, 3072, 9216), (1, 3072, 18432), (2, 1536, 9216))
"""(rows, in, out) of the modulations of FLUX's blocks and SD3's."""
ROWS = (205, 208, 224, 256, 717, 720, 736, 768, 4608)
"""Active tokens of FLUX at 95 %, with text and without, and what tiles would make of them."""
PROJECTIONS = ((3072, (3072, 3072, 3072, 12288)), (3072, (3072,) * 3), (1536, (1536,) * 3))
"""(in, outs) of linear layers that share their input: FLUX's single block, its double, SD3's."""
PROJECTED_ROWS = (82, 205, 256, 717, 768, 4608)


@dataclass(frozen=True)
class Shape:
    """An attention: B samples, H heads, S keys, E wide, and how many queries to try."""

    name: str
    samples: int
    heads: int
    keys: int
    width: int
    queries: tuple[int, ...]

    def stored(self, rows: int) -> Tensor:
        """[B, H, rows, E], in memory as caches are: tokens before heads."""
        return normal(self.samples, rows, self.heads, self.width).transpose(1, 2)


SHAPES = (
    Shape("flux-dev", 1, 24, 4608, 128, (205, 717)),
    Shape("sd3-medium", 2, 24, 4429, 64, (41, 374)),
)


def normal(*shape: int) -> Tensor:
    """Random bfloat16 on the device."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def microseconds(work: Callable[[], object]) -> float:
    """Median of many runs."""
    from triton.testing import do_bench

    return 1e3 * float(do_bench(work, warmup=20, rep=60, return_mode="median"))


def merge(outputs: Tensor, sums: Tensor, parts: int) -> Tensor:
    """Attentions to parts of the keys [B P, H, L, E], with their log sums, as one to all keys."""
    shares = sums.unflatten(0, (-1, parts)).float().softmax(1)
    return (outputs.unflatten(0, (-1, parts)).float() * shares.unsqueeze(-1)).sum(1).to(outputs)


def split(query: Tensor, key: Tensor, value: Tensor, parts: int, merge: Callable[..., Tensor]):
    """Attention with the keys in parts, whatever does not fill a part left out."""

    def in_parts(x: Tensor) -> Tensor:
        whole = x[:, :, : x.shape[2] // parts * parts]
        return whole.unflatten(2, (parts, -1)).transpose(1, 2).flatten(0, 1)

    flash = torch.ops.aten._scaled_dot_product_flash_attention
    queries = query.repeat_interleave(parts, 0)
    outputs, sums = flash(queries, in_parts(key), in_parts(value), 0.0, False)[:2]
    return merge(outputs, sums, parts)


def product(query: Tensor, key: Tensor) -> Tensor:
    """The logits alone, [B, H, L, S]: what every way to measure importance begins with."""
    return (query * query.shape[-1] ** -0.5) @ key.mT


def importance(query: Tensor, key: Tensor) -> Tensor:
    """What the compiler emits to measure importance."""
    return product(query, key).softmax(-1, torch.float32).mean(2).sum(1)


def weighted(query: Tensor, key: Tensor) -> Tensor:
    """The same, summed over queries by a product with one over the sums of their rows."""
    logits = product(query, key).float()
    powers = (logits - logits.amax(-1, keepdim=True)).exp()
    weights = (1 / powers.sum(-1)).to(query).unsqueeze(-2)
    return (weights @ powers.to(query)).float().sum((1, 2)) / query.shape[2]


def transposed(query: Tensor, key: Tensor) -> Tensor:
    """The same with queries innermost in memory, so that their sum is a row's."""
    logits = product(key, query).float()
    sums = logits.logsumexp(-2, keepdim=True)
    return (logits - sums).exp().sum(-1).sum(1) / query.shape[2]


def flashed(query: Tensor, key: Tensor) -> Tensor:
    """The same by two flash attentions: the rows' sums, then keys that attend to the queries."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    sums = flash(query, key, key, 0.0, False)[1]
    least = sums.amin(-1, keepdim=True)
    value = (least - sums).exp().to(query).unsqueeze(-1).expand(query.shape).contiguous()
    output, received = flash(key, query, value, 0.0, False)[:2]
    return (output[..., 0].float() * (received - least).exp()).sum(1) / query.shape[2]


def attentions(shape: Shape, queries: int) -> str:
    """Every way to compute one attention."""
    query, key, value = (shape.stored(rows) for rows in (queries, shape.keys, shape.keys))

    def work() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    found = [f"default {microseconds(work):.0f}"]
    for name, backend in BACKENDS.items():
        with sdpa_kernel(backend):
            found.append(f"{name} {microseconds(work):.0f}")
    compiled = torch.compile(merge)
    for parts in PARTS:
        took = microseconds(lambda parts=parts: split(query, key, value, parts, compiled))
        found.append(f"keys in {parts} parts {took:.0f}")
    return f"{shape.name}, {queries} queries, {shape.keys} keys: " + ", ".join(found)


def linears(rows: int, inner: int, outer: int) -> str:
    """One thin linear layer, by the library and as a sum."""
    torch.compiler.reset()
    x, weight, bias = normal(rows, inner), normal(outer, inner), normal(outer)
    total = torch.compile(lambda x, w, b: (x.unsqueeze(1) * w).sum(-1) + b)
    library = microseconds(lambda: F.linear(x, weight, bias))
    summed = microseconds(lambda: total(x, weight, bias))
    return f"linear {rows} x {inner} -> {outer}: library {library:.0f}, as a sum {summed:.0f}"


def samples(shape: Shape, count: int) -> str:
    """Importance of one attention from so many queries, every way, without the time to launch.

    Launches take longer than such kernels do, and CUDA graphs spare them.
    """
    from triton.testing import do_bench_cudagraph

    key, query, found = shape.stored(shape.keys), shape.stored(count), []
    for way in (product, importance, weighted, transposed, flashed):
        torch.compiler.reset()
        compiled = torch.compile(way)
        compiled(query, key)
        took = do_bench_cudagraph(lambda f=compiled: f(query, key), rep=20, return_mode="median")
        found.append(f"{way.__name__} {1e3 * took:.0f}")
    return f"{shape.name}, importance from {count} queries: " + ", ".join(found)


def rates(rows: int) -> str:
    """A wide linear layer of FLUX for so many rows."""
    x, weight, bias = normal(rows, 3072), normal(21504, 3072), normal(21504)
    took = microseconds(lambda: F.linear(x, weight, bias))
    rate = 2 * rows * weight.numel() / took / 1e6
    return f"linear {rows} x 3072 -> 21504: {took:.0f}, {rate:.0f} TFLOP/s"


def projections(inner: int, outers: Sequence[int]) -> str:
    """Linear layers of one input, one by one and as one, by the number of rows."""
    weights = [normal(outer, inner) for outer in outers]
    merged, found = torch.cat(weights), []
    for rows in PROJECTED_ROWS:
        x = normal(rows, inner)
        separate = microseconds(lambda x=x: [F.linear(x, weight) for weight in weights])
        found.append(f"{rows} rows {separate:.0f} / {microseconds(lambda x=x: x @ merged.T):.0f}")
    return f"linear {inner} -> {'+'.join(map(str, outers))}, separate / merged: " + ", ".join(found)


def main() -> None:
    """Print every figure."""
    print(torch.__version__, torch.cuda.get_device_name())
    for shape in SHAPES:
        for queries in shape.queries:
            print(attentions(shape, queries), flush=True)
    for sizes in LINEARS:
        print(linears(*sizes), flush=True)
    for shape in SHAPES:
        for count in SAMPLES:
            print(samples(shape, count), flush=True)
    for rows in ROWS:
        print(rates(rows), flush=True)
    for inner, outers in PROJECTIONS:
        print(projections(inner, outers), flush=True)


if __name__ == "__main__":
    typer.run(main)
