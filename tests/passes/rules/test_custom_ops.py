"""Row-wise ops that `torch.library.custom_op` makes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import specdiff
from tests.models import changed, randomize
from tests.oracles import trace
from tests.passes.checks import check_oracles
from tests.passes.rules.test_attention_ops import Called, N, _attend
from tests.passes.toys import toy_inputs

pytestmark = pytest.mark.usefixtures("_rowwise_table")


@pytest.mark.parametrize("register", [False, True])
def test_row_wise_ops(register):
    """Without a rule a norm is right, and whole."""

    @torch.library.custom_op("tests::norm", mutates_args=())
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight)

    norm.register_fake(lambda x, weight: torch.empty_like(x))
    if register:
        specdiff.register_rowwise(norm)
    kernel = lambda q, k, v: _attend(norm(q, q.new_ones(q.shape[-1])), k, v, 0.3, False)  # noqa: E731
    model, inputs = randomize(Called(kernel)), toy_inputs()
    found = trace(model, inputs, changed(inputs))
    check_oracles(model, (inputs, changed(inputs)), found)
    selection, nodes = found.analysis.selection, found.analysis.module.graph.nodes
    (norm_,) = (n for n in nodes if "tests.norm" in f"{n.target} {n.args}")
    assert (norm_ in selection.whole) != register


def test_a_table_of_rotations_is_not_taken_for_rows():
    @torch.library.custom_op("tests::rotate", mutates_args=())
    def rotate(x: Tensor, table: Tensor) -> Tensor:
        return x * table[None, :, None]

    rotate.register_fake(lambda x, table: torch.empty_like(x))
    specdiff.register_rowwise("tests::rotate")
    table = torch.arange(N * 4).view(N, 4) / 9
    kernel = lambda q, k, v: _attend(rotate(q, table), k, v, 0.3, False)  # noqa: E731
    model, inputs = randomize(Called(kernel)), toy_inputs()
    found = trace(model, inputs, changed(inputs))
    check_oracles(model, (inputs, changed(inputs)), found)
