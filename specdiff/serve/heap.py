"""Heap: what the process holds of the machine's memory while it draws for weeks; of glibc alone.

glibc gives threads heaps of their own, and each keeps free what its thread once needed, in pieces
that no other thread gets. Pictures are drawn by many threads: the process would grow for hours.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

M_ARENA_MAX = -8
"""Of mallopt: how many heaps there may be."""


def share_heap() -> None:
    """Let threads that have no heap yet share one; for before the first threads begin."""
    if mallopt := _function("mallopt"):
        mallopt(M_ARENA_MAX, 1)


def give_back() -> None:
    """Give the machine what is free in the heap; takes milliseconds, for when nothing is drawn."""
    if malloc_trim := _function("malloc_trim"):
        malloc_trim(ctypes.c_size_t(0))


def _function(name: str) -> Any:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return getattr(library, name, None)
