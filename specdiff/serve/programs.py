"""Programs: the served model compiled, and where its programs lie for the next process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

FOLDER = "TORCHINDUCTOR_CACHE_DIR"


def compile_into(folder: str, model: nn.Module, backend: Any = "inductor") -> None:
    """Compile a model in place, for any size and batch, at its first calls.

    Blocks that repeat are compiled once for all of them, where a model of diffusers names them,
    which takes much less time than all of it in one.

    Args:
        folder: Where Inductor keeps the programs of this process, and finds those of earlier ones.
            They are code: one that only the server's owner can write.
        model: Not compiled so far.
        backend: Of `torch.compile`.
    """
    os.environ[FOLDER] = str(Path(folder).resolve())
    blockwise: Any = getattr(model, "compile_repeated_blocks", None)
    if blockwise is not None and getattr(model, "_repeated_blocks", None):
        blockwise(backend=backend, dynamic=True)
    else:
        model.compile(backend=backend, dynamic=True)
