"""The runtime: decides for every evaluation of a compiled graph which of its programs runs."""

from specdiff.runtime.api import configure, reset, session, stats
from specdiff.runtime.dispatch import DenseOnly, Runtime
from specdiff.runtime.registry import Session
from specdiff.runtime.stats import Stats

__all__ = ["DenseOnly", "Runtime", "Session", "Stats", "configure", "reset", "session", "stats"]
