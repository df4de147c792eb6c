"""Outline: repeated blocks of an emitted program become calls of one graph, compiled once.

A call is PyTorch's `invoke_subgraph`, as `torch.compiler.nested_compile_region` makes it: Inductor
writes code for the graph once, as a function of its operands, and keeps its writes to operands in
place. Weights, caches and all else that differs from copy to copy are operands.

    before                                   after
    h1 = linear(x,  w1);  y1 = gelu(h1)      y1 = call(shared_0, x,  w1)
    h2 = linear(y1, w2);  y2 = gelu(h2)      y2 = call(shared_0, y1, w2)
    h3 = linear(y2, w3);  y3 = gelu(h3)      y3 = call(shared_0, y2, w3)

                                             shared_0(x, w): return gelu(linear(x, w))
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from specdiff import torch_adapter
from specdiff.passes.rules.registry import argument, operand_at, operands, shape_of, start_of
from specdiff.passes.share.repeats import (
    ALIGNMENT,
    FEWEST_NODES,
    Copy,
    find_repeats,
    starts_anywhere,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class Shared:
    """A graph that stands for several copies in a program."""

    name: str
    copies: int
    nodes: int
    """In one copy."""

    def __str__(self) -> str:
        """One line for logs."""
        return f"{self.copies} copies of {self.nodes} nodes share one graph, {self.name}"


def share_repeats(program: fx.GraphModule, call: Any) -> tuple[fx.GraphModule, list[Shared]]:
    """The program with its repeats as calls by `call`, and what is shared; unchanged if nothing."""
    graph, values = fx.Graph(), dict[fx.Node, Any]()
    graph.output(graph.graph_copy(program.graph, values))
    shared = fx.GraphModule(program, graph)  # copies the constants that the graph names
    shared.meta = dict(program.meta)
    outlined: list[Shared] = []
    for copies in find_repeats(shared.graph):
        body = settled(copies)
        if body and len(body[0]) >= FEWEST_NODES:
            name = f"shared_{len(outlined)}"
            outline(shared, name, lift_starts(shared, name, body), call)
            outlined.append(Shared(name, len(body), len(body[0])))
    if not outlined:
        return program, []
    shared.graph.lint()
    shared.recompile()
    return shared, outlined


def settled(copies: Sequence[Copy]) -> list[Copy]:
    """The copies without views that only outside nodes use; none if a call would lose an alias.

    What a call returns has memory of its own, which no operand and no other result may share.
    """
    copies = [*copies]
    while leaving := {i for i in results(copies) if all(sinks(copy, i) for copy in copies)}:
        copies = [tuple(n for i, n in enumerate(copy) if i not in leaving) for copy in copies]
    returned = results(copies)
    return copies if all(is_self_contained(copy, returned) for copy in copies) else []


def results(copies: Sequence[Copy]) -> list[int]:
    """Which values of a copy are used outside it, in any copy."""
    used_outside: set[int] = set()
    for copy in copies:
        inside = set(copy)
        used_outside.update(i for i, node in enumerate(copy) if not inside.issuperset(node.users))
    return sorted(used_outside)


def sinks(copy: Copy, index: int) -> bool:
    """Whether a value is a view of another value of the copy and only used outside."""
    node = copy[index]
    memory = memory_of(node)
    if memory is None or not set(copy).isdisjoint(node.users):
        return False
    sources = [o for o in node.all_input_nodes if o in copy and memory_of(o) == memory]
    return bool(sources) and not any(memory_of(o) == memory for o in inputs_of(copy))


def is_self_contained(copy: Copy, returned: Sequence[int]) -> bool:
    """Whether a copy can become a call without losing an alias.

    Its results and the operands that it writes to must not share memory with each other or with
    other operands. Nothing outside may read what it writes: Inductor does not see that calls write.
    """
    inside, inputs = set(copy), inputs_of(copy)
    given = [memory_of(node) for node in inputs]
    gone = [memory_of(copy[i]) for i in returned]
    written = {memory_of(operands(node)[0]) for node in copy if is_write(node)}
    if None in given or None in gone or len(set(gone)) < len(gone):
        return False
    alone = all(inside.issuperset(n.users) for n in inputs if memory_of(n) in written)
    counts = all(given.count(memory) == 1 for memory in written)
    return alone and counts and set(gone).isdisjoint(given)


def is_write(node: fx.Node) -> bool:
    """Whether a node writes to its first operand."""
    return torch_adapter.mutates(node.target)


def memory_of(node: fx.Node) -> int | None:
    """An identifier of a tensor's memory, the same for aliases; None if it is no tensor."""
    value = node.meta.get("val")
    return torch_adapter.storage_of(value) if isinstance(value, Tensor) else None


def inputs_of(copy: Copy) -> list[fx.Node]:
    """Values from outside that a copy reads, each once."""
    inside = set(copy)
    return [o for o in dict.fromkeys(o for n in copy for o in operands(n)) if o not in inside]


def lift_starts(module: fx.GraphModule, name: str, copies: Sequence[Copy]) -> list[Copy]:
    """Make the start of a strided slice an operand, where copies differ in nothing else."""
    positions = [i for i, node in enumerate(copies[0]) if starts_anywhere(node)]
    for index in reversed(positions):
        starts = [start_of(copy[index], 2, sliced_size(copy[index])) for copy in copies]
        if len(set(starts)) > 1:
            device = copies[0][index].meta["val"].device
            given = start_nodes(module, f"{name}_starts_{index}", starts, device)
            copies = [lifted(copy, index, start) for copy, start in zip(copies, given, strict=True)]
    return [*copies]


def sliced_size(node: fx.Node) -> int:
    """Size of the axis that a slice cuts."""
    dim: int = argument(node, 1, "dim", 0)
    return shape_of(operand_at(node, 0))[dim]


def start_nodes(
    module: fx.GraphModule, name: str, starts: Sequence[int], device: torch.device
) -> list[fx.Node]:
    """A node int64 [1] for each of `starts`, cut from one constant in which each is aligned."""
    every = ALIGNMENT // torch.int64.itemsize
    table = torch.tensor(starts, device=device).repeat_interleave(every)
    module.register_buffer(name, table)
    first = next(iter(module.graph.nodes))
    with module.graph.inserting_before(first):
        node = module.graph.get_attr(name)
    with module.graph.inserting_before(first.next):
        pieces = [(node, 0, i * every, i * every + 1) for i in range(len(starts))]
        return [module.graph.call_function(aten.slice.Tensor, piece) for piece in pieces]


def lifted(copy: Copy, index: int, start: fx.Node) -> Copy:
    """The copy with strided slice `index` replaced by one that begins at the value `start`."""
    node = copy[index]
    value, axis, step = node.args[0], node.args[1], argument(node, 4, "step", 1)
    count, device = node.meta["val"].shape[axis], node.meta["val"].device
    with node.graph.inserting_before(node):
        make = node.graph.call_function
        span = make(aten.arange.start_step, (0, count * step, step), {"device": device})
        rows = make(aten.add.Tensor, (span, start))
        picked = make(aten.index_select.default, (value, axis, rows))
    node.replace_all_uses_with(picked)
    node.graph.erase_node(node)
    return (*copy[:index], span, rows, picked, *copy[index + 1 :])


def outline(module: fx.GraphModule, name: str, copies: Sequence[Copy], call: Any) -> None:
    """Replace each copy by a call of one graph, stored as `name`."""
    returned = results(copies)
    body, slots = as_graph(copies, returned)
    setattr(module, name, fx.GraphModule(module, body))
    for copy in copies:
        late = list(after(copy))
        with module.graph.inserting_after(copy[-1]):
            graph = module.graph.get_attr(name)
        with module.graph.inserting_after(graph):
            given = (operands(copy[i])[k] for i, k in slots)
            last = called = module.graph.call_function(call, (graph, name, *given))
        for position, index in enumerate(returned):
            with module.graph.inserting_after(last):
                last = module.graph.call_function(operator.getitem, (called, position))
            last.meta = dict(copy[index].meta)
            copy[index].replace_all_uses_with(last)
        for node in late:
            last.append(node)
            last = node
        for node in reversed(copy):
            module.graph.erase_node(node)


def as_graph(
    copies: Sequence[Copy], returned: Sequence[int]
) -> tuple[fx.Graph, list[tuple[int, int]]]:
    """The graph of all copies, and for each of its inputs (i, k): it is operand k of node i."""
    graph, inside, inputs = fx.Graph(), dict[fx.Node, fx.Node](), dict[Copy, fx.Node]()
    places = []
    for i, k, slot in operand_slots(copies):
        if slot not in inputs and slot[0] not in copies[0]:
            inputs[slot] = graph.placeholder(f"operand_{len(inputs)}")
            places.append((i, k))
    for nodes in zip(*copies, strict=True):
        slots = zip(*map(operands, nodes), strict=True)
        given = [inside.get(slot[0]) or inputs[slot] for slot in slots]
        inside[nodes[0]] = graph.node_copy(nodes[0], in_turn(given))
    graph.output(tuple(inside[copies[0][i]] for i in returned))
    return graph, places


def in_turn(nodes: Sequence[fx.Node]) -> Callable[[fx.Node], fx.Node]:
    """A mapping of operands by position: one value in this copy may be two in another."""
    pending = iter(nodes)
    return lambda _: next(pending)


def operand_slots(copies: Sequence[Copy]) -> Iterator[tuple[int, int, Copy]]:
    """(i, k, operand k of node i in each copy), for all i and k."""
    for i, nodes in enumerate(zip(*copies, strict=True)):
        for k, slot in enumerate(zip(*map(operands, nodes), strict=True)):
            yield i, k, slot


def after(copy: Copy) -> Iterator[fx.Node]:
    """Nodes between those of a copy that depend on them."""
    inside, made = set(copy), set(copy)
    node = copy[0]
    while node is not copy[-1]:
        node = node.next
        if node not in inside and not made.isdisjoint(node.all_input_nodes):
            made.add(node)
            yield node
