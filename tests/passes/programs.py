"""Random token programs: small diffusion transformers, interpreted from drawn descriptions.

A program embeds image and text tokens, runs blocks over the two streams, and returns image tokens.
Every number of a block is taken modulo what fits, so that hypothesis may shrink all of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.models import Inputs

LATENT, PROMPT = 3, 5
HEADS = 2
DTYPE = torch.float64
"""In double precision a sum taken in another order is told from a fault."""


@dataclass(frozen=True)
class Block:
    """One step of a program: `kind` on the image (or text) stream, with two free numbers."""

    kind: str
    text: bool = False
    residual: bool = True
    a: int = 0
    b: int = 0


@dataclass(frozen=True)
class Spec:
    """A whole program."""

    batch: int
    tokens: int
    text: int
    channels: int
    blocks: tuple[Block, ...]
    start: str = "tokens"
    end: str = "head"


class Weights(nn.Module):
    """What the blocks of one step may use; `x` is the stream, `y` the other, `t` the time."""

    def __init__(self, spec: Spec, block: Block) -> None:
        super().__init__()
        c = spec.channels
        numbers = random.Random(1000 * block.a + block.b)
        self.numbers = tuple(numbers.randrange(5040) for _ in range(40))
        """For the blocks that need more than two."""
        self.q, self.k, self.v, self.o = (nn.Linear(c, c) for _ in range(4))
        self.wide, self.down = nn.Linear(c, 2 * c), nn.Linear(2 * c, c)
        self.time = nn.Linear(1, 3 * c)
        self.norm, self.rms = nn.LayerNorm(c), nn.RMSNorm(c)
        self.conv1, self.conv2 = nn.Conv1d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)
        self.depthwise = nn.Conv1d(c, c, 3, padding=1, groups=c)
        self.table = nn.Parameter(torch.zeros(64, c))
        self.scores = nn.Parameter(torch.zeros(64, 64))


Step = Callable[[Weights, Tensor, Tensor, Tensor, int, int], Tensor]
Both = Callable[[Weights, Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor]]
STEPS: dict[str, Step] = {}
PAIRS: dict[str, Both] = {}
ATTENTIONS = ("self attention", "cross attention", "joint attention", "rope attention")


def step(function: Step) -> Step:
    """Register a block that computes a value like one stream."""
    STEPS[function.__name__.strip("_").replace("_", " ")] = function
    return function


def pair(function: Both) -> Both:
    """Register a block that computes both streams."""
    PAIRS[function.__name__.strip("_").replace("_", " ")] = function
    return function


def divisor(size: int, a: int) -> int:
    """One of the divisors of `size`."""
    found = [d for d in range(1, size + 1) if size % d == 0]
    return found[a % len(found)]


def heads(x: Tensor, count: int = HEADS) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def unheads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


@step
def linear(m, x, y, t, a, b):
    return (m.q, m.k, m.v)[a % 3](x)


@step
def norm(m, x, y, t, a, b):
    if a % 4 == 2:
        return F.layer_norm(x.mT, (x.shape[1],)).mT
    if a % 4 == 3:
        return F.layer_norm(x, x.shape[1:])
    return (m.norm, m.rms)[a % 2](x)


@step
def mlp(m, x, y, t, a, b):
    if a % 2:
        gate, value = m.wide(x).chunk(2, -1)
        return gate.sigmoid() * value
    return m.down(F.gelu(m.wide(x)))


@step
def split_heads(m, x, y, t, a, b):
    z = heads(x)
    if a % 4 == 0:
        z = F.rms_norm(z, (z.shape[-1],))
    elif a % 4 == 1:
        z = z + z.mean(1, keepdim=True)
    elif a % 4 == 2:
        z = z.reshape(z.shape[0] * z.shape[1], *z.shape[2:]).softmax(-1).reshape(z.shape)
    else:
        z = z.flip(1).permute(1, 0, 2, 3).softmax(-1).permute(1, 0, 2, 3)
    return unheads(z)


@step
def grid(m, x, y, t, a, b):
    rows = divisor(x.shape[1], b)
    z = x.unflatten(1, (rows, -1))
    z = (
        m.q,
        lambda z: z.flip(2),
        lambda z: z.softmax(1),
        lambda z: z + z.mean(2, keepdim=True),
        lambda z: z.transpose(1, 2).sin().transpose(1, 2),
        lambda z: z.transpose(1, 2),
        lambda z: z * torch.arange(z.shape[1], dtype=z.dtype)[:, None, None].cos(),
    )[a % 7](z)
    return z.reshape(x.shape)


@step
def merged_samples(m, x, y, t, a, b):
    batch, tokens, channels = x.shape
    if a % 3 == 0:
        return m.q(x.reshape(-1, channels)).view(x.shape)
    if a % 3 == 1:
        z = x.transpose(0, 1).reshape(-1, channels)
        return m.q(z).reshape(tokens, batch, channels).transpose(0, 1)
    # tokens and samples change places without being moved: a view that mixes them
    return m.q(x.reshape(tokens, batch, channels).sin()).reshape(x.shape)


@step
def transposed(m, x, y, t, a, b):
    z = x.mT
    z = (
        z.sin(),
        z.softmax(-1),
        z.contiguous().cumsum(-1),
        z.flip(-2),
        z * m.table[: z.shape[1], :1],
    )[a % 5]
    return z.mT if a % 2 else z.transpose(-1, -2).contiguous()


@step
def shift(m, x, y, t, a, b):
    k = a % x.shape[1]
    return torch.cat([x[:, k:], x[:, :k]], 1)


@step
def rejoined_pieces(m, x, y, t, a, b):
    """Pieces, perhaps overlapping, at other places."""
    n = x.shape[1]
    length = 1 + a % n
    first, second = b % (n - length + 1), (a + b) % (length + 1)
    z = x[:, first : first + length]
    return torch.cat([z, m.q(x)[:, second : second + n - length]], 1)


@step
def overlapping_sums(m, x, y, t, a, b):
    n = x.shape[1]
    k = 1 + a % max(n - 1, 1)
    left, right = x[:, : n - k], x[:, k:]
    total = m.q(left[:, : right.shape[1]] + right) if b % 2 else left * right.sin()
    return torch.cat([total, x[:, :k]], 1) if b % 3 else torch.cat([x[:, :k], total], 1)


@step
def channel_pieces(m, x, y, t, a, b):
    k = 1 + a % (x.shape[2] - 1)
    if b % 3 == 0:
        return torch.cat([x[..., k:], m.q(x)[..., :k]], -1)
    if b % 3 == 1:
        first, second = m.wide(x).split([x.shape[2], x.shape[2]], -1)
        return first * second.sigmoid()
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.cat([odd, even], -1)


@step
def padded(m, x, y, t, a, b):
    before, after = a % 3, b % 3
    if a % 2:
        z = m.norm(F.pad(x, (0, 0, before, after)))
    else:
        z = F.pad(x.mT, (before, after), mode=("constant", "replicate")[b % 2]).mT
    start = (a + b) % (before + after + 1)
    return z[:, start : start + x.shape[1]]


@step
def moved(m, x, y, t, a, b):
    if a % 4 == 0:
        return x.roll(b, 1)
    if a % 4 == 1:
        return x.flip(1)
    if a % 4 == 2:
        return x.cumsum(1) / x.shape[1]
    return x.roll((b, 1), (1, 2))


@step
def written(m, x, y, t, a, b):
    """In-place writes of slices, on a clone."""
    n, c = x.shape[1:]
    k, j = b % n, b % c
    z = (x.clone(), torch.zeros_like(x), m.q(x))[(a // 8) % 3]
    if a % 8 == 0:
        z[:, k:] = m.v(x[:, k:])
    elif a % 8 == 1:
        z[..., ::2] = x[..., 1::2].sin()
    elif a % 8 == 2:
        z[:, ::2] = m.v(x)[:, ::2]
    elif a % 8 == 3:
        z[..., j:] = m.k(x)[..., j:]
    elif a % 8 == 4:
        z[:, k] = m.v(x)[:, k]
    elif a % 8 == 5:
        z[:, k:] += x[:, : n - k]
    elif a % 8 == 6:
        z[:, :k].mul_(2)
    else:
        z[:, k:] = y.mean(1, keepdim=True)
    return z


@step
def written_both_halves(m, x, y, t, a, b):
    """Two values are written into one allocation, at the places they came from or at others."""
    n = x.shape[1]
    k = a % n
    z = torch.empty_like(x)
    z[:, :k] = m.q(x)[:, :k]
    z[:, k:] = m.k(x)[:, k:] if b % 2 else m.k(x)[:, : n - k]
    return z


@step
def self_attention(m, x, y, t, a, b):
    n = x.shape[1]
    q, k, v = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
    options = {}
    if a % 10 == 1:
        options["is_causal"] = True
    elif a % 10 == 2:
        mask = m.scores[:n, :n] > 0
        mask[:, 0] = True
        options["attn_mask"] = mask
    elif a % 10 == 3:
        options["attn_mask"] = m.scores[:n, :n]
    elif a % 10 == 4:
        options["attn_mask"] = m.scores[:1, :n]
    elif a % 10 == 5:
        own = m.q(x).mean(-1)
        options["attn_mask"] = (own[:, :, None] - own[:, None, :])[:, None]
    elif a % 10 == 6 and m.q.in_features == 8:
        q, k, v = heads(m.q(x), 4), heads(m.k(x)[..., :4]), heads(m.v(x)[..., 4:])
        options["enable_gqa"] = True
    elif a % 10 == 7:
        k, v = heads(m.k(x[:, b % n :])), heads(m.v(x[:, b % n :]))
    elif a % 10 == 8:
        q = k = v = heads(x)
    elif a % 10 == 9:
        options["attn_mask"] = m.scores[: x.shape[0], None, None, :n]
    return m.o(unheads(F.scaled_dot_product_attention(q, k, v, **options)))


@step
def cross_attention(m, x, y, t, a, b):
    """Keys are the other stream, or made of both."""
    keys = (
        y,
        torch.cat([x, y], 1),
        torch.cat([y, x[:, b % x.shape[1] :]], 1),
        y.sin(),
        x.mean(1, True),
    )[a % 5]
    query = heads(m.q(x))
    key, value = heads(m.k(keys)), heads(m.v(keys))
    mask = m.scores[: x.shape[1], : keys.shape[1]] if b % 3 == 2 else None
    return m.o(unheads(F.scaled_dot_product_attention(query, key, value, mask)))


@step
def windows(m, x, y, t, a, b):
    """Attention on groups of tokens merged into the batch; the groups may be strided."""
    batch, tokens, channels = x.shape
    size = divisor(tokens, b)
    if a % 3 == 0:
        z = m.q(x).reshape(-1, size, channels)
        z = F.scaled_dot_product_attention(heads(z), heads(z), heads(m.v(z)))
        return unheads(z).reshape(x.shape)
    z = x.roll(1, 1) if a % 3 == 2 else x
    z = z.unflatten(1, (size, -1)).transpose(1, 2).reshape(-1, size, channels)
    z = unheads(F.scaled_dot_product_attention(heads(m.q(z)), heads(m.k(z)), heads(z)))
    return z.reshape(batch, -1, size, channels).transpose(1, 2).reshape(x.shape)


def _rotated(x: Tensor, angles: Tensor, a: int) -> Tensor:
    """`x` [B, H, L, E] by `angles` [L, E / 2]."""
    if a % 3 == 0:
        turned = torch.polar(torch.ones_like(angles), angles)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turned).flatten(3)
    cos, sin = angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1)
    if a % 3 == 1:
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        other = torch.stack([-imaginary, real], -1).flatten(3)
    else:
        first, second = x.chunk(2, -1)
        other = torch.cat([-second, first], -1)
    return x * cos + other * sin


@step
def rope_attention(m, x, y, t, a, b):
    q, k = heads(m.q(x)), heads(m.k(x))
    positions = torch.arange(x.shape[1], dtype=x.dtype)
    angles = positions[:, None] * 0.3 ** torch.arange(q.shape[-1] // 2, dtype=x.dtype)
    q, k = _rotated(q, angles, a), _rotated(k, angles.roll(b, 0), a)
    return m.o(unheads(F.scaled_dot_product_attention(q, k, heads(m.v(x)))))


@step
def complex_pairs(m, x, y, t, a, b):
    """Channels (or neighbouring tokens) as complex numbers, perhaps of a mixed value."""
    z = x.roll(1, 1) if a % 2 else x
    if a % 3 == 0 and x.shape[1] % 2 == 0:
        pairs = torch.view_as_complex(z.mT.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * 1j).flatten(2).mT
    z = z.mT.contiguous().mT.contiguous() if a % 5 == 0 else z
    pairs = torch.view_as_complex(z.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * (0.6 + 0.8j)).flatten(2)


@step
def position_table(m, x, y, t, a, b):
    n = x.shape[1]
    table = m.table[b % 5 : b % 5 + n]
    if a % 5 == 1:
        table = table[None].expand(x.shape[0], -1, -1)
    elif a % 5 == 2:
        table = m.table[torch.arange(n)]
    elif a % 5 == 3:
        table = m.table[:n].sum(-1, keepdim=True)
    elif a % 5 == 4:
        return x * table[None] + y.mean(1, keepdim=True)
    return x + table


@step
def modulated(m, x, y, t, a, b):
    scale, shift_, gate = m.time(t[:, None]).unsqueeze(1).chunk(3, -1)
    if a % 3 == 0:
        return gate * m.q(m.norm(x) * (1 + scale) + shift_)
    if a % 3 == 1:
        return x * t[:, None, None] + m.time(t[:, None])[:, None, : x.shape[2]]
    per_token = scale + m.table[: x.shape[1]]
    return x * per_token


@step
def convolution(m, x, y, t, a, b):
    if a % 3 == 0:
        return m.conv1(x.mT).mT
    if a % 3 == 1:
        return m.depthwise(x.transpose(1, 2)).transpose(1, 2)
    rows = divisor(x.shape[1], b)
    return m.conv2(x.mT.unflatten(2, (rows, -1))).flatten(2).mT


@step
def pooled(m, x, y, t, a, b):
    n = x.shape[1]
    if a % 3 == 0:
        return F.interpolate(x[:, ::2].mT, n).mT
    size = divisor(n, b)
    if a % 3 == 1:
        return F.avg_pool1d(x.mT, size).mT.repeat_interleave(size, 1)
    return F.adaptive_avg_pool1d(x.mT, n).mT


@step
def over_tokens(m, x, y, t, a, b):
    return (
        lambda: x.softmax(1),
        lambda: x.mean(1, keepdim=True).expand(x.shape),
        lambda: x - x.amax(1, keepdim=True),
        lambda: x * y.mean(1, keepdim=True),
        lambda: x.mean(1)[:, None] + m.q(x),
    )[a % 5]()


@step
def products(m, x, y, t, a, b):
    q, k, v = m.q(x), m.k(x), m.v(x)
    if a % 5 == 0:
        return torch.einsum("bnc,dc->bnd", x, m.q.weight)
    if a % 5 == 1:
        return torch.einsum("bnm,bmc->bnc", torch.einsum("bnc,bmc->bnm", q, k).softmax(-1), v)
    if a % 5 == 2:
        return q @ (k.softmax(1).mT @ v)
    if a % 5 == 3:
        return (q @ k.mT).softmax(1) @ v
    return (m.q(x) @ m.k(y).mT).softmax(-1) @ m.v(y)


@step
def picked(m, x, y, t, a, b):
    n = x.shape[1]
    order = torch.arange(n).flip(0).roll(b)
    return (
        lambda: x.gather(1, x.argsort(1)),
        lambda: x[:, order],
        lambda: x.index_select(1, order),
        lambda: x.gather(1, order[None, :, None].expand(x.shape)),
        lambda: x.gather(2, x.argsort(2)),
    )[a % 5]()


@step
def chosen(m, x, y, t, a, b):
    n = x.shape[1]
    if a % 3 == 0:
        return torch.where(x > 0, x, 0.1 * x)
    if a % 3 == 1:
        return torch.where((torch.arange(n) < b % n)[:, None], m.q(x), m.k(x))
    return torch.where((torch.arange(n) % 2 == 0)[None, :, None], x, m.q(x).mean(1, True))


@step
def stacked(m, x, y, t, a, b):
    n = x.shape[1]
    z = m.q(x)
    if a % 5 == 0:
        return torch.stack([x, z], 1).mean(1)
    if a % 5 == 1:
        return torch.stack([x, z], 2).flatten(1, 2)[:, b % n : b % n + n]
    if a % 5 == 2:
        return torch.stack([x, z], -1).flatten(2)[..., : x.shape[2]]
    if a % 5 == 3:
        return torch.stack([x, z], 0).flatten(0, 1)[b % x.shape[0] :][: x.shape[0]]
    return torch.stack([x, z], 2).flatten(1, 2)[:, ::2]


@step
def repeated(m, x, y, t, a, b):
    n = x.shape[1]
    k = b % (n + 1)
    if a % 4 == 0:
        return x.repeat_interleave(2, 1)[:, k : k + n]
    if a % 4 == 1:
        return x.repeat(1, 2, 1)[:, k : k + n]
    if a % 4 == 2:
        return x.repeat_interleave(2, 2)[..., : x.shape[2]]
    return x.repeat(1, 1, 2)[..., x.shape[2] :]


@step
def across_samples(m, x, y, t, a, b):
    if a % 5 == 0:
        return torch.cat([m.q(x[:1]), m.k(x[1:])], 0)
    if a % 5 == 1:
        return x.roll(1, 0)
    if a % 5 == 2:
        return m.q(x[:1]).expand(x.shape)
    if a % 5 == 3:
        return x - x.mean(0, keepdim=True)
    return torch.cat([x[1:], x[:1]], 0).sin()


@step
def punned(m, x, y, t, a, b):
    """Axes that have one size by chance meet."""
    batch, n, c = x.shape
    if a % 5 == 0 and n == c:
        return x.mT.contiguous()
    if a % 5 == 1 and batch == c:
        return x.transpose(0, 2)
    if a % 5 == 2 and batch == n:
        return x.transpose(0, 1)
    if a % 5 == 3:
        # as many tokens of one stream as there are of the other
        k = min(n, y.shape[1])
        return torch.cat([m.q(x[:, :k]) * y[:, :k], x[:, k:]], 1)
    if a % 5 == 4 and n >= c:
        return x + F.pad(x[:, :c].mT, (0, 0, 0, n - c))[..., :1]
    return x.sin()


@step
def cut_of_both(m, x, y, t, a, b):
    """As many tokens, cut out of both streams joined."""
    joint = (torch.cat([y, x], 1), torch.cat([x, y, x], 1), torch.cat([x, y], 1))[a % 3]
    start = b % (joint.shape[1] - x.shape[1] + 1)
    return m.q(joint)[:, start : start + x.shape[1]]


def _reshaped(z: Tensor, a: int, b: int) -> Tensor:
    """One axis split, or two neighbours merged."""
    axis = a % z.dim()
    if b % 3 and axis + 1 < z.dim():
        return z.flatten(axis, axis + 1)
    size = divisor(z.shape[axis], b)
    return z.unflatten(axis, (size, -1)) if z.dim() < 5 else z


def _permutation(rank: int, a: int) -> list[int]:
    axes, order = list(range(rank)), []
    while axes:
        order.append(axes.pop(a % len(axes)))
        a //= len(axes) + 1
    return order


def _rejoined(z: Tensor, axis: int, a: int, b: int) -> Tensor:
    size = z.shape[axis]
    length = 1 + a % size
    pieces = [z.narrow(axis, b % (size - length + 1), length)]
    if length < size:
        pieces.append(z.narrow(axis, (a + b) % (length + 1), size - length).sin())
    return torch.cat(pieces[:: 1 if a % 2 else -1], axis)


def _overwritten(z: Tensor, axis: int, a: int, b: int) -> Tensor:
    size = z.shape[axis]
    length, new = 1 + a % size, z.clone()
    new.narrow(axis, b % (size - length + 1), length).copy_(
        z.narrow(axis, (a + b) % (size - length + 1), length).cos()
    )
    return new


def _inside(z: Tensor, a: int, b: int) -> Tensor:
    """Something that keeps the shape, along some axis."""
    axis, size = b % z.dim(), z.shape[b % z.dim()]
    shape = [size if i == axis else 1 for i in range(z.dim())]
    table = torch.arange(size, dtype=z.dtype).cos().view(shape)
    other = (axis + 1) % z.dim()
    return (
        lambda: z * table,
        lambda: z.softmax(axis),
        z.sin,
        lambda: z + z.mean(axis, keepdim=True),
        lambda: _rejoined(z, axis, a // 11, b // 7),
        lambda: _overwritten(z, axis, a // 11, b // 7),
        lambda: z.roll(1 + a, axis),
        lambda: z + z.transpose(axis, other).cos() if size == z.shape[other] else z.cos(),
        lambda: F.scaled_dot_product_attention(z, z, z, is_causal=a % 2 > 0) if z.dim() > 2 else z,
        lambda: F.layer_norm(z, z.shape[-1:]),
        lambda: z + z.narrow(axis, a % size, 1),
    )[a % 11]()


@step
def scrambled(m, x, y, t, a, b):
    """A random chain of views with something inside; whatever came of it, in the shape of `x`."""
    z = x
    for first, second in zip(m.numbers[: 2 + a % 8], m.numbers[20:], strict=False):
        if first % 3 == 0:
            z = _reshaped(z, first // 3, second)
        elif first % 3 == 1:
            z = z.permute(_permutation(z.dim(), first // 3))
        else:
            z = _inside(z, first // 3, second)
    return z.reshape(x.shape)


@step
def wrapped(m, x, y, t, a, b):
    """Views, something inside, and the same views undone."""
    z, undo = x, []
    for first, second in zip(m.numbers[: 1 + a % 4], m.numbers[20:], strict=False):
        if first % 2:
            undo.append(list(z.shape))
            z = _reshaped(z, first // 2, second)
        else:
            order = _permutation(z.dim(), first // 2)
            undo.append(tuple(order.index(axis) for axis in range(z.dim())))
            z = z.permute(order)
    for first, second in zip(m.numbers[10 : 11 + b % 3], m.numbers[30:], strict=False):
        z = _inside(z, first, second)
    for how in reversed(undo):
        z = z.reshape(how) if isinstance(how, list) else z.permute(how)
    return z


@pair
def joint_attention(m, x, y, t, a, b):
    joint = torch.cat([y, x], 1) if a % 2 else torch.cat([x, y], 1)
    mixed = self_attention(m, m.norm(joint), y, t, b, a // 2)
    if a % 3 == 0:
        joint = joint + mixed
    first = (y if a % 2 else x).shape[1]
    left, right = (joint if a % 3 == 0 else mixed).tensor_split([first], 1)
    x_, y_ = (right, left) if a % 2 else (left, right)
    return (x_, y_) if a % 3 == 0 else (x + x_, y + y_)


@pair
def joint_step(m, x, y, t, a, b):
    """Any other block on both streams joined."""
    joint = torch.cat([y, x], 1)
    name = list(STEPS)[a % len(STEPS)]
    joint = joint + STEPS[name](m, joint, y, t, b, a)
    return joint[:, y.shape[1] :], joint[:, : y.shape[1]]


@pair
def piece_step(m, x, y, t, a, b):
    """Any other block on a piece of the image tokens."""
    k = b % x.shape[1]
    name = list(STEPS)[a % len(STEPS)]
    piece = x[:, k:]
    done = STEPS[name](m, piece, y, t, b // 2, a)
    return torch.cat([x[:, :k], piece + done], 1), y


@pair
def exchanged(m, x, y, t, a, b):
    """The joined streams are cut at another place: tokens go over to the other stream."""
    joint = torch.cat([x, y], 1) if a % 2 else torch.cat([y, x], 1)
    return joint[:, : x.shape[1]], joint[:, x.shape[1] :]


class Program(nn.Module):
    """Interprets a `Spec`."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        c = spec.channels
        self.embed, self.embed_text = nn.Linear(LATENT, c), nn.Linear(PROMPT, c)
        self.steps = nn.ModuleList(Weights(spec, block) for block in spec.blocks)
        self.norm, self.head = nn.LayerNorm(c), nn.Linear(c, LATENT)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor
    ) -> tuple[Tensor]:
        tokens = hidden_states
        if self.spec.start == "image":
            tokens = hidden_states.flatten(2).transpose(1, 2)
        x = self.embed(tokens) + timestep.sin()[:, None, None]
        y = self.embed_text(encoder_hidden_states)
        for block, weights in zip(self.spec.blocks, self.steps, strict=True):
            x, y = self._run(block, weights, x, y, timestep)
        out = self._end(x, y, tokens)
        if self.spec.start == "image":
            out = out.transpose(1, 2).reshape(hidden_states.shape)
        return (out,)

    def _run(
        self, block: Block, m: Weights, x: Tensor, y: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        if block.kind in PAIRS:
            return PAIRS[block.kind](m, x, y, t, block.a, block.b)
        here, there = (y, x) if block.text else (x, y)
        new = STEPS[block.kind](m, here, there, t, block.a, block.b)
        assert new.shape == here.shape, block
        new = here + new if block.residual else new
        return (there, new) if block.text else (new, there)

    def _end(self, x: Tensor, y: Tensor, tokens: Tensor) -> Tensor:
        if self.spec.end == "joint":
            return self.head(self.norm(torch.cat([y, x], 1)))[:, y.shape[1] :]
        out = self.head(self.norm(x))
        if self.spec.end == "from the latent":
            return tokens - out
        if self.spec.end == "mixed":
            return out + 0.1 * out.cumsum(1)
        if self.spec.end == "written":
            new = torch.zeros_like(out)
            new[:, 1:] = out[:, 1:]
            return new
        return out


def build(spec: Spec) -> Program:
    """The program of `spec`, its weights drawn from a fixed seed."""
    torch.manual_seed(0)
    program = Program(spec).to(DTYPE)
    for parameter in program.parameters():
        fan = parameter[0].numel() if parameter.dim() > 1 else 4
        nn.init.normal_(parameter, std=fan**-0.5)
    program.requires_grad_(False)
    return program.eval()


def inputs_of(spec: Spec) -> Inputs:
    """A first call of a program."""
    torch.manual_seed(1)
    shape = (spec.batch, spec.tokens, LATENT)
    if spec.start == "image":
        rows = divisor(spec.tokens, 1)
        shape = (spec.batch, LATENT, rows, spec.tokens // rows)
    return {
        "hidden_states": torch.randn(shape, dtype=DTYPE),
        "encoder_hidden_states": torch.randn(spec.batch, spec.text, PROMPT, dtype=DTYPE),
        "timestep": torch.linspace(0.7, 0.8, spec.batch, dtype=DTYPE),
    }


ENDS = ("head", "joint", "from the latent", "mixed", "written")
_number = st.integers(0, 999)


def _blocks(kinds: tuple[str, ...]) -> st.SearchStrategy[Block]:
    return st.builds(Block, st.sampled_from(kinds), st.booleans(), st.booleans(), _number, _number)


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Any program of at least one attention and at most seven blocks."""
    # views in chains are where the compiler has most to get wrong
    kinds = (*STEPS, *PAIRS, *("scrambled", "wrapped", "rejoined pieces", "written") * 3)
    blocks = draw(st.lists(_blocks(kinds), max_size=5))
    at = draw(st.integers(0, len(blocks)))
    blocks.insert(at, draw(_blocks(ATTENTIONS)))
    return Spec(
        draw(st.integers(1, 3)),
        draw(st.integers(4, 12)),
        draw(st.integers(1, 5)),
        draw(st.sampled_from((4, 8))),
        tuple(blocks),
        draw(st.sampled_from(("tokens", "image"))),
        draw(st.sampled_from(ENDS)),
    )
