"""Oracles 1, 2 and 3 on FLUX, SD3 and SD3.5."""

from __future__ import annotations

import pytest
import torch

from tests.models import MODELS, changed
from tests.oracles import MaskedDense, Traced, pick, random_active, trace

SHARES = (0.0, 0.3, 0.9)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=list(MODELS))
def traced(request):
    build, config = MODELS[request.param]
    model, inputs = build(**config)
    with torch.no_grad():
        yield model, inputs, trace(model, inputs, changed(inputs))


def active_sets(found: Traced):
    signature = found.analysis.signature
    for share in SHARES:
        count = max(1, round(share * signature.prunable_tokens))
        yield random_active(signature.batch, signature.prunable_tokens, count)


def caches_of(found: Traced):
    return [slot.allocate() for slot in found.analysis.signature.caches]


def test_probe_and_tail_are_the_model(traced):
    model, inputs, found = traced
    programs, flat = found.programs(), found.flat[0]
    outputs = programs.tail(flat, programs.probe(flat).tokens)
    torch.testing.assert_close(outputs[0], model(**inputs)[0], **TOLERANCE)


def test_dense_is_the_probe_and_reports_the_same_importance(traced):
    found = traced[2]
    programs, flat = found.programs(), found.flat[0]
    probe, dense = programs.probe(flat), programs.dense(flat, caches_of(found))
    torch.testing.assert_close(dense.tokens, probe.tokens, **TOLERANCE)
    torch.testing.assert_close(dense.importance, probe.importance, **TOLERANCE)


def test_oracle_1_idempotence(traced):
    """After a dense step, a selective step on the same input returns the dense output."""
    found = traced[2]
    programs, flat, caches = found.programs(), found.flat[0], caches_of(found)
    dense = programs.dense(flat, caches)
    before = [cache.clone() for cache in caches]
    for active in active_sets(found):
        selective = programs.selective(flat, caches, active)
        torch.testing.assert_close(selective.tokens, pick(dense.tokens, active), **TOLERANCE)
        for cache, old in zip(caches, before, strict=True):
            torch.testing.assert_close(cache, old, **TOLERANCE)


def test_oracle_2_masked_dense(traced):
    """With another input, stale rows are exactly those of the caches."""
    found = traced[2]
    flat, later = found.flat
    for active in active_sets(found):
        programs, caches = found.programs(), caches_of(found)
        programs.dense(flat, caches)
        selective = programs.selective(later, caches, active)

        first = MaskedDense(found.analysis, {}, active)
        first.run(*flat)
        oracle = MaskedDense(found.analysis, first.values, active)
        oracle.run(*later)
        plan = found.analysis.plan
        expected = oracle.values[plan.slot.name]
        torch.testing.assert_close(selective.tokens, pick(expected, active), **TOLERANCE)
        # the oracle itself must differ from a dense step, or it would prove nothing
        assert not torch.allclose(pick(programs.probe(later).tokens, active), selective.tokens)


def test_oracle_3_all_active_is_the_model(traced):
    model, inputs, found = traced
    programs, caches = found.programs(), caches_of(found)
    before, flat = found.flat
    programs.dense(before, caches)
    signature = found.analysis.signature
    active = torch.arange(signature.prunable_tokens).expand(signature.batch, -1)
    outputs = programs.tail(flat, programs.selective(flat, caches, active).tokens)
    torch.testing.assert_close(outputs[0], model(**changed(inputs))[0], **TOLERANCE)


def test_importance_is_the_attention_received(traced):
    """All queries sampled: the sum over heads and layers of softmax columns, by hand."""
    found = traced[2]
    flat = found.flat[0]
    oracle = MaskedDense(found.analysis, {}, torch.zeros(1, 1, dtype=torch.int64))
    oracle.run(*flat)
    plan = found.analysis.plan
    total = torch.zeros(found.analysis.signature.tokens.shape[:2])
    for node in found.analysis.module.graph.nodes:
        if "scaled_dot_product" in str(node.target):
            query, key = (oracle.values[a.name] for a in node.args[:2])
            weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
            for piece in plan.axes.layout(node.args[1], 2):
                if piece.segment == plan.prunable:
                    columns = slice(piece.offset, piece.offset + piece.length)
                    total += weights.mean(2).sum(1)[:, columns]
    torch.testing.assert_close(found.programs().probe(flat).importance, total, **TOLERANCE)
