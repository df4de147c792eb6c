"""Errors a caller can make, each naming the option or tensor and the valid choices."""

from __future__ import annotations


class SpecdiffError(Exception):
    """Base of every error raised by specdiff."""


class OptionError(SpecdiffError, ValueError):
    """An option is unknown, of the wrong type or out of range."""


class NotCompiledError(SpecdiffError, LookupError):
    """A model was asked for runtime state it does not have."""


def described(error: Exception) -> str:
    """Kind and first line of an error of ours or of torch's, which may have many."""
    first = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first}"


class Unsupported(SpecdiffError):
    """The graph has no token-selective form; the message is the reason shown to the user."""


class Fault(SpecdiffError):
    """A program could not be written or compiled, though it should: the graph runs dense."""
