"""specdiff: `torch.compile(model, backend="specdiff")` for diffusion transformers.

The names below are loaded on first use, so that importing the package (which `TORCH_LOGS` does
during `import torch`) stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdiff.compiler import backend
    from specdiff.errors import NotCompiledError, OptionError, SpecdiffError
    from specdiff.inspect.explaining import explain
    from specdiff.inspect.report import Report
    from specdiff.options import Options
    from specdiff.oracles.verification import Verification, verify
    from specdiff.passes.rules.attention_ops import register_attention
    from specdiff.passes.rules.rowwise import register_rowwise
    from specdiff.plan import Plan
    from specdiff.runtime.api import attach, configure, detach, record, reset, rows, session, stats
    from specdiff.runtime.blocks.attach import Attachment
    from specdiff.runtime.records.recording import Recording, StepRecord
    from specdiff.runtime.records.stats import Stats
    from specdiff.runtime.streams.registry import Session
    from specdiff.tuning.tuner import Tuned, tune

    __version__: str

_HOMES = {
    "attach": "specdiff.runtime.api",
    "backend": "specdiff.compiler",
    "configure": "specdiff.runtime.api",
    "detach": "specdiff.runtime.api",
    "explain": "specdiff.inspect.explaining",
    "record": "specdiff.runtime.api",
    "register_attention": "specdiff.passes.rules.attention_ops",
    "register_rowwise": "specdiff.passes.rules.rowwise",
    "reset": "specdiff.runtime.api",
    "rows": "specdiff.runtime.api",
    "session": "specdiff.runtime.api",
    "stats": "specdiff.runtime.api",
    "tune": "specdiff.tuning.tuner",
    "verify": "specdiff.oracles.verification",
    "Attachment": "specdiff.runtime.blocks.attach",
    "Options": "specdiff.options",
    "Plan": "specdiff.plan",
    "Recording": "specdiff.runtime.records.recording",
    "Report": "specdiff.inspect.report",
    "Session": "specdiff.runtime.streams.registry",
    "StepRecord": "specdiff.runtime.records.recording",
    "Stats": "specdiff.runtime.records.stats",
    "Tuned": "specdiff.tuning.tuner",
    "Verification": "specdiff.oracles.verification",
    "NotCompiledError": "specdiff.errors",
    "OptionError": "specdiff.errors",
    "SpecdiffError": "specdiff.errors",
}

__all__ = [
    "attach",
    "backend",
    "configure",
    "detach",
    "explain",
    "record",
    "register_attention",
    "register_rowwise",
    "reset",
    "rows",
    "session",
    "stats",
    "tune",
    "verify",
    "Attachment",
    "Options",
    "Plan",
    "Recording",
    "Report",
    "Session",
    "StepRecord",
    "Stats",
    "Tuned",
    "Verification",
    "NotCompiledError",
    "OptionError",
    "SpecdiffError",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("specdiff")
    if name not in _HOMES:
        raise AttributeError(f"module 'specdiff' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
