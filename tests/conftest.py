"""What every test gets: fixed seeds, and a Dynamo that has forgotten the test before."""

import os
import sys
from collections.abc import Iterator

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # a core each


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    # Dynamo stops compiling, silently, after eight variants of one function.
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
