"""Axes: which axes of which values index the same tokens.

Every (value, axis) is an element of a union-find. A rule's links unite two elements; its parts say
that one axis is a piece of another. Pieces of one axis with the same offset and length are one
axis, too; this is applied until nothing changes. A *segment* is a smallest piece of an attention's
sequence axis, such as the text or the image:

    x = cat([text, image], 1)       text [B, 77, C], image [B, 256, C], x [B, 333, C]
    y = attention(q(x), k(x), v(x)) links: axis 1 of x, q, k and y is one class
    z = y[:, 77:]                   part: axis 1 of z is y's piece at offset 77, so it is the image
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

from torch import fx
from torch.fx.node import Argument

from specdiff.errors import Unsupported
from specdiff.passes.base import Pass, PassError
from specdiff.passes.rules import Facts, Part, facts_of
from specdiff.passes.rules.attention import ATTENTION, Attention
from specdiff.passes.rules.attention_ops import why_unread
from specdiff.passes.rules.registry import Axis, is_tensor, rank_of, shape_of

ClassId = int


@dataclass(frozen=True)
class Piece:
    """A segment inside an axis."""

    segment: ClassId
    offset: int
    length: int


Layout = tuple[Piece, ...]


class AxisClasses:
    """A union-find over axes that also knows which axis is a piece of which."""

    def __init__(self) -> None:
        self._parent: list[ClassId] = []
        self._size: list[int] = []
        self._of: dict[Axis, ClassId] = {}
        self._parts: set[tuple[ClassId, int, int, ClassId]] = set()

    def class_of(self, axis: Axis) -> ClassId:
        """The class of an axis; a new class if the axis is new."""
        if axis not in self._of:
            self._of[axis] = self.fresh(shape_of(axis[0])[axis[1]])
        return self.find(self._of[axis])

    def fresh(self, size: int) -> ClassId:
        """A new class without members."""
        self._parent.append(len(self._parent))
        self._size.append(size)
        return len(self._parent) - 1

    def find(self, item: ClassId) -> ClassId:
        """The representative of `item`'s class."""
        while self._parent[item] != item:
            self._parent[item] = self._parent[self._parent[item]]
            item = self._parent[item]
        return item

    def size(self, item: ClassId) -> int:
        """Number of positions along this axis."""
        return self._size[self.find(item)]

    def unite(self, left: ClassId, right: ClassId) -> None:
        """Make two classes one. Raises PassError if their sizes differ."""
        left, right = self.find(left), self.find(right)
        if self._size[left] != self._size[right]:
            raise PassError(f"axes of {self._size[left]} and {self._size[right]} positions united")
        self._parent[max(left, right)] = min(left, right)

    def add(self, node: fx.Node, facts: Facts) -> None:
        """Add one node's facts."""
        for link in facts.links:
            self.unite(
                self.class_of((node, link.out_axis)), self.class_of((link.operand, link.in_axis))
            )
        for part in facts.parts:
            whole, piece = self.class_of(part.whole), self.class_of(part.part)
            self._parts.add((whole, part.offset, self.size(piece), piece))

    def close(self) -> None:
        """Unite pieces with the same place in the same whole, until nothing changes."""
        changed = True
        while changed:
            changed = False
            seen: dict[tuple[ClassId, int, int], ClassId] = {}
            for stated, offset, length, piece in sorted(self._parts):
                whole = self.find(stated)
                if offset == 0 and length == self.size(whole):
                    first = whole
                else:
                    first = seen.setdefault((whole, offset, length), piece)
                if self.find(first) != self.find(piece):
                    self.unite(first, piece)
                    changed = True
        self._parts = {
            (self.find(w), o, n, self.find(p)) for w, o, n, p in self._parts if n < self.size(w)
        }

    def layout(self, item: ClassId) -> Layout:
        """The smallest pieces of an axis, in order."""
        item = self.find(item)
        pieces = {(offset, length): part for w, offset, length, part in self._parts if w == item}
        if not pieces:
            return (Piece(item, 0, self.size(item)),)
        cuts = sorted({0, self.size(item)} | {c for o, n in pieces for c in (o, o + n)})
        layout: list[Piece] = []
        for start, stop in pairwise(cuts):
            part = pieces.get((start, stop - start))
            if part is None:
                part = self.fresh(stop - start)
                self._parts.add((item, start, stop - start, part))
            layout += [Piece(p.segment, start + p.offset, p.length) for p in self.layout(part)]
        return tuple(layout)


@dataclass
class AxisFacts:
    """What `AxesPass` finds: the facts of each node, the layout of each axis, the segments."""

    graph: fx.Graph
    classes: AxisClasses
    facts: dict[fx.Node, Facts]
    segments: tuple[ClassId, ...]
    """Every segment of every attention, longest first."""
    batch: ClassId
    """The axis that counts samples: in front of the queries, and of the output if it is there."""
    _layouts: dict[ClassId, Layout] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """B."""
        return self.classes.size(self.batch)

    def layout(self, node: fx.Node, axis: int) -> Layout:
        """The segments along one axis."""
        item = self.classes.class_of((node, axis))
        if item not in self._layouts:
            self._layouts[item] = self.classes.layout(item)
        return self._layouts[item]

    def is_exact(self, part: Part) -> bool:
        """Whether a part consists of the same segments as its place in the whole.

        It does not where pieces overlap: the whole is then cut more finely than the part.
        """
        stop = part.offset + shape_of(part.part[0])[part.part[1]]
        inside = [p for p in self.layout(*part.whole) if part.offset <= p.offset < stop]
        moved = [replace(p, offset=p.offset + part.offset) for p in self.layout(*part.part)]
        return inside == moved

    def axes_with(self, node: fx.Node, *segments: ClassId) -> list[int]:
        """The axes of `node` along which any of `segments` lies."""
        if not is_tensor(node):
            return []
        return [
            axis
            for axis in range(rank_of(node))
            if any(piece.segment in segments for piece in self.layout(node, axis))
        ]

    def batch_axis(self, node: fx.Node) -> int | None:
        """The axis that counts samples, if there is exactly one."""
        axes = [a for a in range(rank_of(node)) if self.classes.class_of((node, a)) == self.batch]
        return axes[0] if len(axes) == 1 else None

    def outputs(self) -> Iterator[fx.Node]:
        """The tensors that the graph returns."""
        return (n for n in self.graph.output_node().all_input_nodes if is_tensor(n))

    def results(self) -> tuple[Argument, ...]:
        """What the graph returns, in order: nodes, and constants such as None."""
        returned = self.graph.output_node().args[0]
        if not isinstance(returned, list | tuple):
            raise PassError("the graph returns no tuple")
        return tuple(returned)


class AxesPass(Pass[fx.GraphModule, AxisFacts]):
    """Finds segments and batch axis. Raises Unsupported if a graph has no attention."""

    name = "axes"

    def apply(self, value: fx.GraphModule) -> AxisFacts:
        """Collect the facts of every node, unite what is one axis, read off the segments."""
        classes = AxisClasses()
        facts = {node: facts_of(node) for node in value.graph.nodes}
        for node, facts_of_node in facts.items():
            classes.add(node, facts_of_node)
        classes.close()
        attentions = [Attention.of(n) for n in value.graph.nodes if n.target is ATTENTION]
        if not attentions:
            why = why_unread(value.graph)
            raise Unsupported(f"the graph has no attention, so no tokens were found{why}")
        batch = _batch_of(classes, value.graph, attentions)
        segments = {
            piece.segment
            for attention in attentions
            if classes.class_of((attention.query, 0)) == batch
            for sequence in attention.sequences
            for piece in classes.layout(classes.class_of(sequence))
        }
        ordered = tuple(sorted(segments, key=lambda s: (-classes.size(s), s)))
        return AxisFacts(value.graph, classes, facts, ordered, batch)

    def verify(self, value: fx.GraphModule, result: AxisFacts) -> None:
        """Every layout tiles its axis."""
        for node in value.graph.nodes:
            if not is_tensor(node):
                continue
            for axis, size in enumerate(shape_of(node)):
                position = 0
                for piece in result.layout(node, axis):
                    if piece.offset != position:
                        raise PassError(f"{node.name}: the layout of axis {axis} has a gap")
                    position += piece.length
                if position != size:
                    raise PassError(f"{node.name}: the layout of axis {axis} is not its size")

    def summary(self, result: AxisFacts) -> str:
        """The segments that were found, s0 the longest."""
        sizes = [f"s{i} of {result.classes.size(s)}" for i, s in enumerate(result.segments)]
        return f"segments of tokens: {', '.join(sizes)}"

    def notes(self, result: AxisFacts) -> dict[fx.Node, str]:
        """For values with segments, what lies along each axis; B counts samples."""
        known = {segment: f"s{i}" for i, segment in enumerate(result.segments)}
        return {
            node: _axes_text(node, result, known)
            for node in result.graph.nodes
            if result.axes_with(node, *result.segments)
        }


def _batch_of(classes: AxisClasses, graph: fx.Graph, attentions: list[Attention]) -> ClassId:
    """The first axis of the queries.

    Attentions may differ in it: some count samples times frames. The first axis of the graph's
    outputs wins, then that of the attentions with most work.
    """
    work: Counter[ClassId] = Counter()
    for attention in attentions:
        work[classes.class_of((attention.query, 0))] += (
            attention.query.meta["val"].numel() * shape_of(attention.key)[-2]
        )
    outputs = [n for n in graph.output_node().all_input_nodes if is_tensor(n) and rank_of(n)]
    returned = {classes.class_of((node, 0)) for node in outputs}
    return max(work, key=lambda batch: (batch in returned, work[batch]))


def _axes_text(node: fx.Node, result: AxisFacts, known: dict[ClassId, str]) -> str:
    texts = []
    for axis, size in enumerate(shape_of(node)):
        names = [known.get(piece.segment) for piece in result.layout(node, axis)]
        if all(names):
            texts.append("+".join(str(name) for name in names))
        else:
            texts.append("B" if axis == result.batch_axis(node) else str(size))
    return f"[{', '.join(texts)}]"
