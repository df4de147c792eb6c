"""Which attention rows measure importance, and what is made of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from specdiff.passes.emit.importance import even_stride
from specdiff.passes.emit.rows import emit_selective
from specdiff.passes.emit.whole import emit_block_probe, emit_dense, emit_probe
from specdiff.passes.emit.without_text import emit_without_text
from tests.models import flux
from tests.oracles import trace
from tests.passes.checks import importance_of

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
    # every eleventh of 680: an even stride would meet the same columns again and again
    assert sampled(emit_dense(found.module, found.selection, 68)) == {61}
    # 332 image tokens and the text: half of all
    assert sampled(emit_selective(found.module, found.selection, 68, 332)) == {30}


@pytest.mark.parametrize(("sample", "rows"), [(128, 5), (24, 5), (2, 1)])
def test_a_few_rows_are_sampled_anyway(sample, rows):
    found = analysis(rows=12, columns=14, text=12)
    assert sampled(emit_without_text(found.module, found.selection, sample, 5)) == {rows}


def softmaxes(program: fx.GraphModule) -> int:
    return len(program.graph.find_nodes(op="call_function", target=aten.softmax.int))


def test_importance_that_nobody_reads_is_not_measured():
    """Of a plan that selects no tokens, and of selective steps that are not to measure it."""
    found = analysis(rows=4, columns=6, text=8)
    assert softmaxes(emit_dense(found.module, found.selection, 8)) == 2
    selective = (emit_selective, 0, 5), (emit_without_text, 0, 5)
    for emit, *wanted in ((emit_probe,), (emit_block_probe,), *selective):
        program = emit(found.module, found.selection, *wanted)
        assert softmaxes(program) == 0
        # nor does it compute anything else that the model does not
        products = program.graph.find_nodes(op="call_function", target=aten.matmul.default)
        assert not products


@pytest.mark.parametrize(
    ("least", "length", "stride"),
    [
        (9, 32 * 32, 9),
        (16, 32 * 32, 17),
        (33, 32 * 32, 35),  # one more than the width: diagonals
        (31, 32 * 32, 35),
        (9, 64 * 64, 11),  # as 64 is 7 * 9 + 1
        (37, 64 * 64, 37),
        (65, 48 * 64, 69),
        (13, 48 * 64, 15),  # as 48 and 64 are 1 less or 1 more than multiples
        (13, 997, 13),  # of no picture
    ],
)
def test_sampled_rows_do_not_line_up_in_a_picture(least, length, stride):
    assert even_stride(least, [length]) == stride


class Local(nn.Module):
    """Tokens on a ring that attend to their neighbours, all in the same way."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        turns = torch.arange(tokens)[:, None] / tokens * torch.arange(1, 17) * 2 * torch.pi
        self.register_buffer("places", torch.cat([turns.cos(), turns.sin()], 1))
        self.embed, self.head = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, hidden_states, timestep):
        x = self.embed(hidden_states) * 1e-3 + timestep[:, None, None] * 1e-3
        query = (x + self.places).unflatten(-1, (1, 32)).transpose(1, 2)
        out = F.scaled_dot_product_attention(query, query, query, scale=1.0)
        return self.head(x + out.transpose(1, 2).flatten(2))


def test_nearness_to_the_sampled_rows_does_not_count():
    """Nine tokens from one sampled row to the next, and few that attend over more than three."""
    tokens, sample = 198, 24
    model, noise = Local(tokens), torch.randn(2, tokens, 8)
    assert (model.places @ model.places.T).softmax(1).max() * tokens > 9
    with torch.no_grad():
        found = trace(model, {"hidden_states": noise, "timestep": torch.ones(2)})
        exact, importance = importance_of(found), importance_of(found, sample)
    assert not torch.equal(importance, exact)
    torch.testing.assert_close(importance, exact, rtol=0.05, atol=0)
