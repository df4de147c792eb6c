"""Publish: write the drawings and the report of a graph where somebody looks for them."""

from __future__ import annotations

from specdiff import torch_adapter
from specdiff.options import Options
from specdiff.passes.graph.dump import Dump, unfailing
from specdiff.pipeline import Analysis


def publish(analysis: Analysis | str, dump: Dump | None, options: Options) -> None:
    """Write them beside the dump and for tlparse, if either is wanted; errors are logged.

    Args:
        analysis: the analysis of the graph, or the reason why it runs dense.
        dump: where the graph is dumped, if it is.
        options: that the graph is compiled with.
    """
    if dump is None and not torch_adapter.traces_artifacts():
        return

    def work() -> None:
        # here, as the compiler runs without what the pages need
        from specdiff.inspect import export

        for name, text in export.texts(analysis, options):
            torch_adapter.trace_artifact(f"specdiff_{name}", text)
            if dump is not None:
                (dump.folder / name).write_text(text, encoding="utf-8")

    unfailing(work)
