"""`specdiff.verify` of single blocks, and that it fails where a plan is wrong."""

from __future__ import annotations

import pytest
import torch

import specdiff
from specdiff.passes.emit.lower import BlockPrograms
from tests.models import flux, sd3

ORACLES = ("dense", "idempotence", "masked dense", "all active")


def block_of_sd3():
    block = sd3(qk_norm="rms_norm", dual=(0,), layers=2)[0].transformer_blocks[0]
    tokens, text, time = torch.randn(2, 12, 32), torch.randn(2, 5, 32), torch.randn(2, 32)
    return block, {"hidden_states": tokens, "encoder_hidden_states": text, "temb": time}


def test_a_block_is_judged_as_one():
    block, inputs = block_of_sd3()
    verdict = specdiff.verify(block, **inputs)
    (graph,) = verdict.graphs
    assert verdict.passed and not verdict.selective
    # the text could be what a root's output is made of, too
    assert {f"as a block of 12, {oracle}" for oracle in ORACLES} <= set(graph.errors)
    assert 0 <= verdict.max_error < 1e-5


@pytest.mark.parametrize("wrong", ["dense", "selective"])
def test_a_wrong_block_fails(monkeypatch, wrong):
    right = getattr(BlockPrograms, wrong)

    def other(self, *given):
        first, *rest = right(self, *given)
        return [first + 0.01, *rest]

    monkeypatch.setattr(BlockPrograms, wrong, other)
    block, inputs = block_of_sd3()
    verdict = specdiff.verify(block, **inputs)
    assert not verdict.passed
    assert "FAILED" in str(verdict)


def test_a_graph_with_a_plan_of_its_own_is_not_judged_as_a_block():
    model, inputs = flux(layers=1)
    (graph,) = specdiff.verify(model, **inputs).graphs
    assert not any("block" in oracle for oracle in graph.errors)
