"""Repeats: find blocks of a program that do the same work on other operands.

Two nodes are alike if they have the same op, the same constants, and operands and results of the
same shapes, strides, dtypes and devices. Blocks that follow one another form a stretch of nodes in
which each node is alike the one a period later:

    a b c | d e f g | d e f g | d e f g | h      a stretch of 12 nodes with period 4

The first block often holds more, such as values that all blocks use; these nodes stay outside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from specdiff.passes.rules.attention import ATTENTION
from specdiff.passes.rules.registry import argument, operands
from specdiff.passes.select.residuals import PROJECTIONS

aten = torch.ops.aten
FEWEST_COPIES = 3
FEWEST_NODES = 16
"""Least number of nodes in one copy: fewer are not worth a call."""
PERIODS = 64
"""Number of likeliest block lengths that are tried."""
ALIGNMENT = 16
"""Bytes; code for an operand that begins at a multiple of this may rely on it."""
MATRIX = (*PROJECTIONS, ATTENTION, aten.matmul.default, aten.bmm.default, aten.addmm.default)
"""Ops whose operands and results are in memory anyway: a border beside one costs no fusion."""

Copy = tuple[fx.Node, ...]


@dataclass(frozen=True)
class Stretch:
    """`length` nodes from `start` on; each is alike the one `period` later, if that is inside."""

    start: int
    length: int
    period: int

    @property
    def saved(self) -> int:
        """Nodes that need not be compiled."""
        return (self.length // self.period - 1) * self.period


def find_repeats(graph: fx.Graph) -> list[tuple[Copy, ...]]:
    """Groups of alike copies, in graph order; no node is in two of them."""
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    keys = interned([alike(node) for node in nodes])
    repeats, free = [], [True] * len(nodes)
    while (stretch := longest(keys, free)) is not None:
        copies = split(nodes, stretch)
        free[stretch.start : stretch.start + stretch.length] = [False] * stretch.length
        if len(copies) >= FEWEST_COPIES:
            repeats.append(copies)
    return repeats


def interned(values: Sequence[Hashable]) -> list[int]:
    """A number for each value, the same for equal values."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(value, len(numbers)) for value in values]


def alike(node: fx.Node) -> Hashable:
    """A key that is equal for nodes that are alike."""
    anywhere = starts_anywhere(node)
    args = node.args[:2] if anywhere else node.args
    step = argument(node, 4, "step", 1) if anywhere else None
    return (
        node.target,
        _hashable(args),
        _hashable(node.kwargs),
        step,
        described(node.meta.get("val")),
    )


def starts_anywhere(node: fx.Node) -> bool:
    """Whether a node is a strided slice: its start may become an operand."""
    return node.target is aten.slice.Tensor and argument(node, 4, "step", 1) != 1


def described(value: Any) -> Hashable:
    """What compiled code may rely on in a value."""
    if isinstance(value, Tensor):
        aligned = value.storage_offset() * value.element_size() % ALIGNMENT == 0
        return (value.dtype, tuple(value.shape), value.stride(), value.device, aligned)
    if isinstance(value, list | tuple):
        return tuple(described(part) for part in value)
    return str(type(value))


def _hashable(value: Any) -> Hashable:
    if isinstance(value, fx.Node):
        return described(value.meta.get("val"))
    if isinstance(value, list | tuple):
        return tuple(_hashable(part) for part in value)
    if isinstance(value, dict):
        return tuple((name, _hashable(value[name])) for name in sorted(value))
    # 1, 1.0 and True are equal to Python but not to an op's dtype
    return type(value), str(value)


def longest(keys: Sequence[int], free: Sequence[bool]) -> Stretch | None:
    """The stretch that saves most nodes; of several, the one with the shortest period."""
    best = None
    for period in sorted(likely_periods(keys, free)):
        for stretch in stretches(keys, free, period):
            if best is None or stretch.saved > best.saved:
                best = stretch
    return best


def likely_periods(keys: Sequence[int], free: Sequence[bool]) -> list[int]:
    """The most frequent distances from a node to the next one that is alike."""
    last: dict[int, int] = {}
    distances: Counter[int] = Counter()
    for i, key in enumerate(keys):
        if free[i]:
            distances[i - last.get(key, i)] += 1
            last[key] = i
    return [d for d, _ in distances.most_common() if d >= FEWEST_NODES][:PERIODS]


def stretches(keys: Sequence[int], free: Sequence[bool], period: int) -> Iterator[Stretch]:
    """All stretches of one period with at least two copies."""
    start = 0
    for i in range(len(keys) - period + 1):
        inside = i + period < len(keys) and free[i] and free[i + period]
        if inside and keys[i] == keys[i + period]:
            continue
        if i - start >= period:
            yield Stretch(start, i - start + period, period)
        start = i + 1


def split(nodes: Sequence[fx.Node], stretch: Stretch) -> tuple[Copy, ...]:
    """The copies in a stretch that are wired alike, cut where a border costs least."""
    period, stop = stretch.period, stretch.start + stretch.length
    starts = range(stretch.start + cheapest_cut(nodes, stretch), stop - period + 1, period)
    copies = [tuple(nodes[start : start + period]) for start in starts]
    like = wiring(copies[len(copies) // 2])
    return tuple(copy for copy in copies if wiring(copy) == like)


def cheapest_cut(nodes: Sequence[fx.Node], stretch: Stretch) -> int:
    """Offset in a period at which a border between copies costs least.

    A border costs the bytes of values that cross it and could have been fused with their users. A
    matrix product reads and writes memory anyway, so a value can be fused only with users between
    the same products: those of the same depth. Ties go to the border that fewest bytes cross.

    An example of period 4, costs taken in the second copy; each value has 1 byte, y' is the last y:

        node, depth      n = norm(y'), 1   q = linear(n), 2   h = gelu(q), 2   y = h + y', 2
        lost before it   1  (y' to n)      0                  0                1  (h to y)
        crossing         1  (y')           2  (y', n)         2  (y', q)       2  (y', h)

    The cut goes before q.

    Returns:
        How many nodes of the stretch come before the first copy.
    """
    depth = matrix_depths(nodes)
    position = {node: i for i, node in enumerate(nodes)}
    middle = stretch.start + min(stretch.period, stretch.length - stretch.period)
    lost, crossing = [0] * (stretch.period + 1), [0] * (stretch.period + 1)
    for node in nodes[stretch.start :]:
        users = [user for user in node.users if user in position]
        fusable = [u for u in users if u.target not in MATRIX and depth[u] == depth[node]]
        for ends, cost in ((fusable if node.target not in MATRIX else [], lost), (users, crossing)):
            last = max((position[user] for user in ends), default=-1)
            for i in range(max(position[node] + 1, middle), min(last, middle + stretch.period) + 1):
                cost[i - middle] += bytes_of(node)
    order = [(lost[i], crossing[i], i) for i in range(stretch.period)]
    return (min(order)[2] + middle - stretch.start) % stretch.period


def bytes_of(node: fx.Node) -> int:
    """Bytes of a value."""
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def matrix_depths(nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """For each node, the largest number of matrix products on a path to it, itself included."""
    depth: dict[fx.Node, int] = {}
    for node in nodes:
        before = max((depth.get(operand, 0) for operand in node.all_input_nodes), default=0)
        depth[node] = before + (node.target in MATRIX)
    return depth


def wiring(copy: Copy) -> list[list[int | None]]:
    """For each node, the positions of its operands in the copy; None for one from outside."""
    index = {node: i for i, node in enumerate(copy)}
    return [[index.get(operand) for operand in operands(node)] for node in copy]
