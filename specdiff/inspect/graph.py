"""Graph: the regions of a model, or the ops of one block, as networkx graphs with plain attributes.

Every node has a `label`, a `kind` that decides its colour, a `weight` from 0 to 1 that decides its
size, `whole` if a selective step computes all of it, and a `note` with the details.
"""

from __future__ import annotations

import re

import networkx
from torch import fx

from specdiff.passes.graph.python_file import op_name
from specdiff.passes.rules.attention import ATTENTION
from specdiff.passes.rules.registry import is_tensor, shape_of
from specdiff.passes.select.cost import Sizes
from specdiff.passes.select.regions import Region
from specdiff.passes.select.signature import module_path
from specdiff.pipeline import Analysis

Drawing = networkx.DiGraph
BLOCK = re.compile(r"^(.*?\.\d+)(\.|$)")
"""The path of a repeated block: up to its number."""


def short_count(value: float, unit: str) -> str:
    """`1.7 GFLOP`: three digits at most."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000 or prefix == "T":
            break
        value /= 1000
    return f"{value:.3g} {prefix}{unit}"


def region_graph(analysis: Analysis) -> Drawing[str]:
    """A node for each region, input, residual addition and output; an edge for each value.

    Regions also have `path`, `ops`, `dense_flops`, `selective_flops` (a formula) and
    `cache_bytes`.
    """
    graph: Drawing[str] = networkx.DiGraph()
    sizes, boxes = Sizes.of(analysis.selection), _boxes(analysis)
    most = max((sizes.evaluate(r.dense_work.flops) for r in analysis.regions), default=0.0) or 1.0
    for number, region in enumerate(analysis.regions):
        graph.add_node(f"region_{number}", **_describe(region, sizes, most))
    for node in analysis.selection.axes.graph.nodes:
        box = boxes.get(node)
        if box is None:
            continue
        if box not in graph:
            _add_plain(graph, box, node)
        for operand in node.all_input_nodes:
            origin = boxes.get(operand)
            if origin is not None and origin != box:
                graph.add_edge(origin, box)
    return graph


def _boxes(analysis: Analysis) -> dict[fx.Node, str]:
    """For each node of the traced graph, the box that it belongs to; parameters have none."""
    boxes = {n: f"region_{i}" for i, r in enumerate(analysis.regions) for n in r.nodes}
    parameters = set(analysis.signature.indices("parameter"))
    for i, node in enumerate(analysis.selection.axes.graph.find_nodes(op="placeholder")):
        if i not in parameters and is_tensor(node):
            boxes[node] = f"input_{i}"
    for node in analysis.selection.axes.graph.nodes:
        if node not in boxes and (node.op == "output" or is_tensor(node)):
            boxes[node] = node.name if node.op in ("call_function", "output") else ""
    return {node: box for node, box in boxes.items() if box}


def _describe(region: Region, sizes: Sizes, most: float) -> dict[str, str | int | float | bool]:
    flops = sizes.evaluate(region.dense_work.flops)
    lines = [
        f"{region.kind}: {region.path or 'several modules'}",
        f"{len(region.nodes)} ops",
        f"FLOPs of a dense step: {region.dense_work.flops} = {short_count(flops, 'FLOP')}",
        f"FLOPs of a selective step: {region.selective_work.flops}",
        f"caches: {short_count(sizes.evaluate(region.cache_bytes), 'B')}",
    ]
    cost = f"{short_count(flops, 'FLOP')}" if flops else f"{len(region.nodes)} ops"
    return {
        "label": f"{region.kind}\n{region.path or 'several modules'}\n{cost}",
        "kind": region.kind,
        "weight": (flops / most) ** 0.5,
        "whole": not region.shrinks,
        "note": "\n".join(lines),
        "path": region.path,
        "ops": len(region.nodes),
        "dense_flops": int(flops),
        "selective_flops": str(region.selective_work.flops),
        "cache_bytes": int(sizes.evaluate(region.cache_bytes)),
    }


def _add_plain(graph: Drawing[str], box: str, node: fx.Node) -> None:
    """An input, a residual addition or the output."""
    if node.op == "placeholder":
        label, kind = re.findall(r"[A-Za-z_]\w*", str(node.meta["source"]))[-1], "input"
    elif node.op == "output":
        label, kind = "output", "input"
    else:
        label, kind = "+", "add"
    shape = f"{list(shape_of(node))}" if is_tensor(node) else ""
    note = f"{label} {shape}".strip()
    graph.add_node(box, label=label, kind=kind, weight=0.0, whole=False, note=note)


def block_path(analysis: Analysis) -> str:
    """Module path of the first block with an attention, e.g. `transformer_blocks.0`."""
    paths = [module_path(n) for n in analysis.selection.axes.graph.nodes if n.target is ATTENTION]
    first = paths[0] if paths else ""
    match = BLOCK.match(first)
    return match[1] if match else first


def block_graph(analysis: Analysis, path: str) -> Drawing[str]:
    """Every op of one block; values from outside are drawn as inputs.

    The kind of a node is the form that its value has in a selective step, such as rows or cached.
    """
    graph: Drawing[str] = networkx.DiGraph()
    inside = [n for n in analysis.selection.axes.graph.nodes if _lies_in(n, path)]
    members = set(inside)
    for node in inside:
        graph.add_node(node.name, **_describe_op(analysis, node))
        for operand in node.all_input_nodes:
            if operand not in members and operand.op == "call_function":
                note = f"{operand.name} {list(shape_of(operand))} {module_path(operand)}"
                plain = {"label": operand.name, "kind": "input", "weight": 0.0, "whole": False}
                graph.add_node(operand.name, **plain, note=note)
            if operand.op == "call_function":
                graph.add_edge(operand.name, node.name)
    return graph


def _lies_in(node: fx.Node, path: str) -> bool:
    here = module_path(node)
    return is_tensor(node) and node.op == "call_function" and f"{here}.".startswith(f"{path}.")


def _describe_op(analysis: Analysis, node: fx.Node) -> dict[str, str | float | bool]:
    selection = analysis.selection
    if node in selection.cached:
        kind = "cached"
    elif node in selection.known:
        kind = "looked up"
    elif node in selection.rows and selection.is_token_wise(node):
        kind = "rows"
    else:
        kind = "computed whole" if node in selection.whole else "not needed"
    op, shape = op_name(node.target), list(shape_of(node))
    reason = (
        selection.why_whole(node) if kind == "computed whole" and selection.carries(node) else None
    )
    lines = [f"{node.name} = {node.target}", f"{shape} {module_path(node)}", kind]
    return {
        "label": f"{op}\n{shape}",
        "kind": kind,
        "weight": 0.4 if node.target is ATTENTION else 0.1,
        "whole": kind == "computed whole",
        "note": "\n".join([*lines, *([reason] if reason else [])]),
    }
