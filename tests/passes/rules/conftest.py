"""What tests of rules share."""

from __future__ import annotations

import pytest

from specdiff.passes.rules import rowwise
from specdiff.passes.rules.rowwise import ROWWISE


@pytest.fixture
def _rowwise_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row-wise ops that a test registers are forgotten after it."""
    monkeypatch.setattr(rowwise, "ROWWISE", dict(ROWWISE))
    monkeypatch.setattr("specdiff.passes.normalize.read_rowwise.ROWWISE", rowwise.ROWWISE)
