"""Key/value caches on loan: streams lease a set, and a set whose lease dies serves the next one.

Evaluations that no selective step follows up write to a *scratch* set, whose tensors share memory:
so they run the dense program too, and no second program without caches has to be compiled.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from specdiff.program import CacheSlot
from specdiff.runtime.streams.time_tables import TableRows

IDLE_SETS = 2
"""Those of both halves of guidance in separate calls: sets at other addresses than before make CUDA
graphs be recorded anew."""


class Lease:
    """Ownership of one set of caches, which goes back to its pool when the lease is dropped.

    Taken by a dense step, which writes the caches at once, all but the tables: a stream's lease is
    never older than its last dense step. `rows` tells what the tables hold.
    """

    def __init__(self, caches: Sequence[Tensor]) -> None:
        self.caches = tuple(caches)
        self.rows = TableRows()


class CachePool:
    """All caches of one graph; keeps at most `IDLE_SETS` unused sets for reuse."""

    def __init__(self, slots: Sequence[CacheSlot]) -> None:
        self._slots = tuple(slots)
        self._set_bytes = sum(slot.nbytes for slot in slots)
        self._idle: list[tuple[Tensor, ...]] = []
        self._leased = 0
        self._scratch: tuple[Tensor, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held, in use or idle; the scratch set is none of them, for it keeps nothing."""
        return (self._leased + len(self._idle)) * self._set_bytes

    def lease(self, max_bytes: int | None) -> Lease | None:
        """A set of caches with unspecified contents, or None if it would exceed `max_bytes`."""
        if max_bytes is not None and (self._leased + 1) * self._set_bytes > max_bytes:
            return None
        lease = Lease(self._idle.pop() if self._idle else self._allocate())
        self._leased += 1
        weakref.finalize(lease, self._take_back, lease.caches).atexit = False
        return lease

    def scratch(self) -> tuple[Tensor, ...]:
        """A set that a dense program may write and nobody may read: all in the memory of one slot.

        Always the same tensors, as CUDA graphs need it.
        """
        if self._scratch is None:
            with torch.inference_mode(False):
                self._scratch = _in_one_place(self._slots)
        return self._scratch

    def drop_idle(self) -> None:
        """Free the sets that nobody uses."""
        self._idle.clear()
        self._scratch = None

    def _allocate(self) -> tuple[Tensor, ...]:
        # Inference tensors could not be updated in place by a later call outside inference mode.
        with torch.inference_mode(False):
            return tuple(slot.allocate() for slot in self._slots)

    def _take_back(self, caches: tuple[Tensor, ...]) -> None:
        self._leased -= 1
        if len(self._idle) < IDLE_SETS:
            self._idle.append(caches)


def _in_one_place(slots: Sequence[CacheSlot]) -> tuple[Tensor, ...]:
    """A tensor of each slot; those of a device begin at the same address."""
    places = {
        slot.device: torch.empty(
            max(other.nbytes for other in slots if other.device == slot.device),
            dtype=torch.uint8,
            device=slot.device,
        )
        for slot in slots
    }
    return tuple(
        places[slot.device][: slot.nbytes].view(slot.dtype).view(slot.shape) for slot in slots
    )
