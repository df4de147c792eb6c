"""Read row-wise ops: each result of an op of the table becomes a node on unmerged operands.

    before                                            after
    r  = functional(norm_, q=view(q, [B, N * H, D]))  q2 = row_result(norm_, ..., q=q)
    q2 = view(r[1], [B, N, H, D])                        [B, N, H, D], as q

So every later pass sees one tensor per node, and tokens as an axis. A call that does not fit what
`specdiff.passes.rules.rowwise` says of its op stays as it is, and is computed whole.
"""

from __future__ import annotations

import operator

from torch import Tensor, fx

from specdiff import torch_adapter
from specdiff.passes.normalize.rewrite import call, refresh, replace, reshaped
from specdiff.passes.normalize.row_operands import Misfit, Unmerged
from specdiff.passes.rules.registry import is_tensor, shape_of
from specdiff.passes.rules.row_results import row_result
from specdiff.passes.rules.rowwise import ROWWISE, RowOperands
from specdiff.torch_adapter import OpCall


def read_rowwise(graph: fx.Graph) -> None:
    """Rewrite every call of an op of the table that fits what the table says."""
    moved: set[fx.Node] = set()
    for node in list(graph.nodes):
        found = torch_adapter.op_call(node)
        operands = ROWWISE.get(torch_adapter.op_name(found.op) or "") if found else None
        if found is None or operands is None:
            continue
        results = _results(node, found)
        if results:
            try:
                moved |= _rewritten(node, found, results, operands)
            except Misfit:
                continue
    if moved:
        refresh(graph, moved)


def _results(node: fx.Node, found: OpCall) -> dict[fx.Node, str | int]:
    """The nodes that hold one tensor each; none if something else uses what the call returns."""
    if is_tensor(node):
        return {node: 0}
    names = {place: key for key, place in found.results.items()}
    for user in node.users:
        if user.target is not operator.getitem or user.args[1] not in names or not is_tensor(user):
            return {}
    return {user: names[user.args[1]] for user in node.users}  # type: ignore[index]


def _tensors(node: fx.Node) -> list[Tensor]:
    """All that a call returns."""
    value = node.meta["val"]
    values = value if isinstance(value, list | tuple) else [value]
    return [each for each in values if isinstance(each, Tensor)]


def _rewritten(
    node: fx.Node, found: OpCall, results: dict[fx.Node, str | int], operands: RowOperands
) -> set[fx.Node]:
    """Put a node for each result in place of the call; return what has other strides."""
    first = min(results)
    keys = tuple(found.results) or (0,)
    unmerged = Unmerged(first, found, operands)
    arguments = unmerged.arguments([*results])
    if any(tuple(each.shape[:-1]) != unmerged.seen for each in _tensors(node)):
        raise Misfit  # one that nobody uses is made all the same
    how = (keys, unmerged.like, unmerged.merged, unmerged.fresh)
    made = {
        result: call(first, row_result, found.op, keys.index(key), *how, **arguments)
        for result, key in results.items()
    }
    shaped = {result: reshaped(first, new, shape_of(result)) for result, new in made.items()}
    moved = set().union(*(replace(result, new) for result, new in shaped.items()))
    if results != {node: 0}:
        node.graph.erase_node(node)
    return moved
