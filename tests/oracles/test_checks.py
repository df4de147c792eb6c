"""Oracles 1, 2 and 3 on FLUX, SD3 and SD3.5."""

from __future__ import annotations

import pytest
import torch

from specdiff.oracles.checks import MaskedDense, as_tokens, pick, random_active
from tests.models import MODELS, ZOO, changed
from tests.oracles import small_tables, trace
from tests.passes.checks import (
    TOLERANCE,
    all_active,
    caches_of,
    idempotence,
    masked_dense,
    probe_is_the_model,
    without_text,
)


@pytest.fixture(scope="module", params=list(MODELS))
def traced(request):
    """Model, inputs, analysis, and programs that the tests of one model share."""
    build, config = MODELS[request.param]
    model, inputs = build(**config)
    with torch.no_grad(), small_tables():
        found = trace(model, inputs, changed(inputs))
        assert found.analysis.selection.tabulated
        yield model, inputs, found, found.programs()


def test_probe_and_tail_are_the_model(traced):
    probe_is_the_model(*traced)


def test_dense_is_the_probe(traced):
    found, programs = traced[2:]
    flat = found.flat[0]
    torch.testing.assert_close(
        programs.dense(flat, caches_of(found)).tokens, programs.probe(flat), **TOLERANCE
    )


def test_oracle_1_idempotence(traced):
    """After a dense step, a selective step on the same input returns the dense output."""
    idempotence(*traced[2:], **TOLERANCE)


def test_oracle_2_masked_dense(traced):
    """With another input, stale rows are exactly those of the caches."""
    masked_dense(*traced[2:], **TOLERANCE)


def test_text_kept(traced):
    """A step that computes no text reads the keys and values of the last that did."""
    found, programs = traced[2:]
    assert without_text(found, programs, **TOLERANCE)
    active = random_active(found.analysis.signature.batch, found.analysis.signature.lengths, 9)
    with_text, without = (oracle_values(found, active, text) for text in (True, False))
    # the oracle itself must differ from the one in which text is fresh
    assert not torch.allclose(with_text, without, **TOLERANCE)


def oracle_values(found, active, text):
    flat, later = found.flat
    first = MaskedDense(found.analysis, {}, active)
    first.run(*flat)
    second = MaskedDense(found.analysis, first.values, active, text=text)
    second.run(*later)
    return pick(as_tokens(found.analysis.selection, second.values), active)


def test_oracle_3_all_active_is_the_model(traced):
    model, inputs, found, programs = traced
    all_active(model, changed(inputs), found, programs, **TOLERANCE)


def test_importance_is_the_attention_received(traced):
    """All queries sampled: the sum over heads and layers of softmax columns, by hand."""
    found, programs = traced[2:]
    flat = found.flat[0]
    oracle = MaskedDense(found.analysis, {}, torch.zeros(1, 1, dtype=torch.int64), every=True)
    oracle.run(*flat)
    selection = found.analysis.selection
    total = torch.zeros(found.analysis.signature.tokens.shape[:2])
    for node in found.analysis.module.graph.nodes:
        if "scaled_dot_product" in str(node.target):
            query, key = (oracle.values[a.name] for a in node.args[:2])
            weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
            for piece in selection.axes.layout(node.args[1], 2):
                if piece.segment in selection.prunable:
                    columns = slice(piece.offset, piece.offset + piece.length)
                    total += weights.mean(2).sum(1)[:, columns]
    importance = programs.dense(flat, caches_of(found)).importance
    torch.testing.assert_close(importance, total, **TOLERANCE)


def test_what_is_added_to_tokens_is_added_to_what_moves_the_latent(traced):
    _, _, found, programs = traced
    inputs = found.flat[0]
    signature = programs.signature
    assert signature.additive
    tokens, more = torch.randn(2, *signature.tokens.shape).unbind(0)
    (both,), (first,), (second,) = (
        programs.tail(inputs, value) for value in (tokens + more, tokens, more)
    )
    torch.testing.assert_close(both, first + second)


def test_a_learned_variance_moves_nothing():
    case = ZOO["dit_transformer"]()
    assert not trace(case.model, case.inputs).analysis.signature.additive
