"""Which attention rows measure importance: a share, and no larger one where few are computed."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from specdiff.passes.emit import emit_dense
from specdiff.passes.frozen import emit_frozen
from specdiff.passes.rows import emit_selective
from tests.models import flux
from tests.oracles import trace

aten = torch.ops.aten


def sampled(program: fx.GraphModule) -> set[int]:
    """Rows of every attention that are sampled."""
    softmax = program.graph.find_nodes(op="call_function", target=aten.softmax.int)
    assert softmax
    return {node.meta["val"].shape[-2] for node in softmax}


def analysis(**sizes):
    model, inputs = flux(batch=1, **sizes)
    with torch.no_grad():
        return trace(model, inputs).analysis


def test_a_selective_step_samples_as_small_a_share_as_a_dense_one():
    found = analysis(rows=24, columns=28, text=8)
    assert sampled(emit_dense(found.module, found.plan, 68, fill=False)) == {68}
    # 332 image tokens and the text: half of all
    assert sampled(emit_selective(found.module, found.plan, 68, 332)) == {34}


@pytest.mark.parametrize(("sample", "rows"), [(128, 5), (24, 5), (2, 1)])
def test_a_few_rows_are_sampled_anyway(sample, rows):
    found = analysis(rows=12, columns=14, text=12)
    assert sampled(emit_frozen(found.module, found.plan, sample, 5)) == {rows}
