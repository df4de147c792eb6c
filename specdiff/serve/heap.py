"""Heap: one of the C library's for all threads, so that a server which draws for weeks stays small.

glibc gives threads heaps of their own, and each keeps free what its thread once needed, in pieces
that no other thread gets. Pictures are drawn by many threads: the process would grow for hours.
"""

from __future__ import annotations

import ctypes
import sys

M_ARENA_MAX = -8
"""Of glibc's mallopt: how many heaps there may be."""


def share_heap() -> None:
    """Let threads that have no heap yet share one, where the C library is glibc.

    Call it before the first threads begin.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt = getattr(library, "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)
