"""Python file: a graph as code that a person can read and run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, fx
from torch.fx.graph import PythonCode

STATEMENT = re.compile(r"^    (\w+)(?:: [^=]+)? = ")

PREAMBLE = """\
def inputs():
    \"\"\"Random values of the shapes that were traced: floats normal, whole numbers zero.\"\"\"
    return [
{inputs}
    ]


"""
MAIN = """

if __name__ == "__main__":
    for output in forward(constants, *inputs()):
        print(getattr(output, "shape", output))
"""


def to_python(module: fx.GraphModule, head: str, notes: Mapping[fx.Node, list[str]]) -> str:
    """The text of a file that runs a graph: `forward(constants, *inputs())`.

    Args:
        module: The graph. Its own tensors (`constants_of`), if it has any, are read from a file of
            the same name that ends in `.pt`.
        head: One line of provenance.
        notes: Comment lines to write above the statement of a node.
    """
    code = module.graph.python_code("self", verbose=True)
    blocks = [
        f'"""{head}"""\n',
        "\n".join(_head(_imports(code), bool(constants_of(module)))) + "\n\n",
        PREAMBLE.format(inputs="\n".join(_inputs(module.graph))),
        _annotated(code.src.strip(), {node.name: lines for node, lines in notes.items()}),
        MAIN,
    ]
    return "\n".join(blocks)


def constants_of(module: fx.GraphModule) -> dict[str, Tensor]:
    """The tensors that a graph holds itself, by name; parameters are inputs."""
    names = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    attributes = {name: getattr(module, name, None) for name in sorted(names)}
    return {name: value for name, value in attributes.items() if isinstance(value, Tensor)}


def _head(imports: Iterable[str], constants: bool) -> Iterator[str]:
    yield "from pathlib import Path"
    yield "from types import SimpleNamespace"
    yield ""
    yield "import torch"
    yield from imports
    yield ""
    path = 'Path(__file__).with_suffix(".pt")'
    yield f"constants = SimpleNamespace(**{f'torch.load({path})' if constants else '{}'})"


def _imports(code: PythonCode) -> Iterator[str]:
    """Import statements for the names that the code uses."""
    used = set(re.findall(r"\w+", code.src)) - {"torch"}
    return (_import(name, value) for name, value in sorted(code.globals.items()) if name in used)


def _import(name: str, value: Any) -> str:
    if isinstance(value, ModuleType):
        return f"import {value.__name__} as {name}"
    if isinstance(value, float):
        return f"{name} = float({str(value)!r})"
    if isinstance(value, str):
        return f"{name} = {value!r}"
    if value is type(None):
        return f"{name} = type(None)"
    origin = getattr(value, "__module__", None) or "builtins"
    return f"from {origin} import {getattr(value, '__qualname__', name)} as {name}"


def _inputs(graph: fx.Graph) -> Iterator[str]:
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val", node.meta.get("example_value"))
        source = node.meta.get("source", "")
        yield f"        {_example(value)},  # {node.name} {source}".rstrip()


def _example(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    maker = "randn" if value.dtype.is_floating_point or value.dtype.is_complex else "zeros"
    place = "" if value.device.type == "cpu" else f", device={str(value.device)!r}"
    return f"torch.{maker}({[int(size) for size in value.shape]}, dtype={value.dtype}{place})"


def _annotated(source: str, notes: Mapping[str, list[str]]) -> str:
    lines = []
    for line in source.splitlines():
        statement = STATEMENT.match(line)
        comments = notes.get(statement[1], []) if statement else []
        lines += [*(f"    # {comment}" for comment in comments), line.rstrip()]
    return "\n".join(lines)


def op_counts(graph: fx.Graph) -> dict[str, int]:
    """How often each op occurs, most often first."""
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method", "call_module"):
            continue
        name = op_name(node.target)
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def op_name(target: Any) -> str:
    """The name of an op without namespace and overload, e.g. `linear`."""
    packet = getattr(target, "overloadpacket", target)
    return str(getattr(packet, "__name__", packet))
