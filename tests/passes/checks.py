"""Oracles 1 to 3 as plain functions of one traced model; every one can fail."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from specdiff.compiler import lowered_programs
from specdiff.options import Options
from specdiff.oracles import checks as oracles
from specdiff.oracles.checks import Pair, pick, random_active
from tests.models import Inputs
from tests.oracles import Traced

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
SHARES = (0.3, 0.9)


def active_sets(found: Traced, shares: Sequence[float]) -> Iterator[Tensor]:
    """A few ascending active sets, different for each sample."""
    signature = found.analysis.signature
    for share in shares:
        count = max(1, round(share * signature.prunable_tokens))
        yield random_active(signature.batch, signature.lengths, count)


def assert_equal(pairs: Iterator[Pair], **tolerance: float) -> None:
    for pair in pairs:
        torch.testing.assert_close(pair.actual, pair.expected, **tolerance)


def caches_of(found: Traced) -> list[Tensor]:
    """Empty caches: a row that is read before it is written shows as nan."""
    return [torch.full_like(slot.allocate(), torch.nan) for slot in found.analysis.signature.caches]


def importance_of(found: Traced, sample: int | None = None) -> Tensor:
    """What a dense step measures from so many queries, or all, on the first call's inputs."""
    options = Options(ablation={"importance_queries": sample}, inner_backend="eager")
    programs = lowered_programs(found.analysis, options, {})
    return programs.dense(found.flat[0], caches_of(found)).importance


def idempotence(
    found: Traced, programs: Any, shares: Sequence[float] = SHARES, **tolerance: float
) -> None:
    """Oracle 1: after a dense step, a selective step on the same input gives the dense output."""
    for active in active_sets(found, shares):
        pairs = oracles.idempotence(found.analysis, programs, found.flat[0], active)
        assert_equal(pairs, **tolerance)


def masked_dense(
    found: Traced, programs: Any, shares: Sequence[float] = SHARES, **tolerance: float
) -> None:
    """Oracle 2: on another input, stale rows are exactly those of the caches."""
    flat, later = found.flat
    probed = programs.probe(later)
    differs = False
    for active in active_sets(found, shares):
        for pair in oracles.masked_dense(found.analysis, programs, flat, later, active):
            torch.testing.assert_close(pair.actual, pair.expected, **tolerance)
            differs |= not torch.allclose(pick(probed, active), pair.actual)
    # the oracle itself must differ from a dense step, or it would prove nothing
    assert differs


def without_text(
    found: Traced, programs: Any, shares: Sequence[float] = SHARES, **tolerance: float
) -> bool:
    """The same of a step without text; returns whether this model has one."""
    flat, later = found.flat
    compared = False
    for active in active_sets(found, shares):
        for pair in oracles.without_text(found.analysis, programs, flat, later, active):
            torch.testing.assert_close(pair.actual, pair.expected, **tolerance)
            compared = True
    return compared


def all_active(
    model: nn.Module, later: Inputs, found: Traced, programs: Any, **tolerance: float
) -> None:
    """Oracle 3: with every token active, the selective program is the model."""
    outputs = [value for value in model(**later) if value is not None]
    pairs = oracles.all_active(found.analysis, programs, *found.flat, outputs)
    assert_equal(pairs, **tolerance)


def probe_is_the_model(model: nn.Module, inputs: Inputs, found: Traced, programs: Any) -> None:
    flat = found.flat[0]
    outputs = programs.tail(flat, programs.probe(flat))
    for output, expected in zip(outputs, model(**inputs), strict=True):
        torch.testing.assert_close(output, expected, **TOLERANCE)


def check_oracles(
    model: nn.Module, calls: Sequence[Inputs], found: Traced, **tolerance: float
) -> None:
    """All three on one set of programs; one share is enough beside that of all tokens."""
    tolerance = tolerance or TOLERANCE
    programs = found.programs()
    with torch.no_grad():
        idempotence(found, programs, SHARES[:1], **tolerance)
        masked_dense(found, programs, SHARES[:1], **tolerance)
        without_text(found, programs, SHARES[:1], **tolerance)
        all_active(model, calls[1], found, programs, **tolerance)
