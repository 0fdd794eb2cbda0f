"""Errors that reach a user: every message names what is wrong and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """Start-up input is unusable (a parameter, the checkpoint, a file); the model must not become READY."""


class UnreachableError(ConfigError):
    """What the start-up input names cannot be reached now, though it may be later: starting again can help."""


class InvalidRequestError(ValueError):
    """A request is malformed or asks for something that is not allowed (Triton INVALID_ARGUMENT)."""


class UnavailableError(RuntimeError):
    """The request cannot be taken now: queue full, engine restarting, request shed (Triton UNAVAILABLE)."""


def nearest_known(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known one that is like it, else all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
