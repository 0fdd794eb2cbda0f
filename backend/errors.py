"""Errors that reach a user: every message names what is wrong and what is allowed."""


class ConfigError(ValueError):
    """Start-up input is unusable (a parameter, the checkpoint, a file); the model must not become READY."""


class InvalidRequestError(ValueError):
    """A request is malformed or asks for something that is not allowed (Triton INVALID_ARGUMENT)."""


class UnavailableError(RuntimeError):
    """The request cannot be taken now: queue full, engine restarting, request shed (Triton UNAVAILABLE)."""
