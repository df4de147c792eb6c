"""The runtime: decides for every evaluation of a compiled graph which of its programs runs."""

from specdiff.runtime.api import configure, reset, session, stats
from specdiff.runtime.records.stats import Stats
from specdiff.runtime.step.dispatch import DenseOnly, Runtime
from specdiff.runtime.streams.registry import Session

__all__ = ["DenseOnly", "Runtime", "Session", "Stats", "configure", "reset", "session", "stats"]
