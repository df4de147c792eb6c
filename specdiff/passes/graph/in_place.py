"""In place: whether a Dynamo graph writes to its inputs, so that each of its calls must run."""

from __future__ import annotations

import operator

from torch import fx

VIEWS = ("view", "reshape", "transpose", "permute", "flatten", "unsqueeze", "squeeze", "narrow")


def writes_to_inputs(graph: fx.Graph) -> bool:
    """Whether the graph changes an input, or a view of one, in place, such as a key cache."""
    return any(
        _is_write(node) and node.args and _comes_from_input(node.args[0]) for node in graph.nodes
    )


def _is_write(node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target is operator.setitem or "out" in node.kwargs
    method = str(node.target)
    return node.op == "call_method" and method.endswith("_") and not method.endswith("__")


def _comes_from_input(value: object) -> bool:
    """Whether `value` is an input or a view of one."""
    while isinstance(value, fx.Node) and value.op != "placeholder":
        is_view = value.target is operator.getitem or value.target in VIEWS
        if not is_view or not value.args:
            return False
        value = value.args[0]
    return isinstance(value, fx.Node)
