"""What every test gets: fixed seeds, a Dynamo that has forgotten the test before, no trace."""

import logging
import os
import sys
from collections.abc import Generator, Iterator

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # a core each


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """Pytest listens to loggers that do not propagate, so torch would trace what nobody reads.

    That took gigabytes in the long property test: a megabyte and 200 records for each program.
    """
    log = logging.getLogger("torch.__trace")
    log.handlers = [h for h in log.handlers if not type(h).__module__.startswith("_pytest.")]
    return (yield)


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    # Dynamo stops compiling, silently, after eight variants of one function.
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
