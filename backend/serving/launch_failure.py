"""Why a Triton server ended, in one sentence, read from its log."""

from __future__ import annotations

import json
import re

_MODEL = re.compile(r"failed to load '(?P<model>[^']+)' version \d+: (?P<reason>.*)")
_LIBRARY = re.compile(r"error while loading shared libraries: (?P<reason>.*)")
_ENDPOINT = re.compile(r"failed to start (?P<service>\w+) service: (?P<reason>.*)")
_ERROR = re.compile(r"^error: (?P<reason>.*)", re.MULTILINE)
#: A Triton status code and the exception types that carry a message for the user.
_PREFIXES = re.compile(r"^(?:(?:Internal|Invalid argument|Unavailable|Unknown) ?[:-] )?(?:TritonModelException: )?")
#: The traceback that the Python stub appends to an exception's text.
_TRACEBACK = "\n\nAt:\n"


def failure_sentence(log: str) -> str | None:
    """The sentence for the user in a server's log, or None if the log has nothing known to be a cause.

    A missing library comes first (all that follows is its consequence), then the first model that failed, then a port.
    """
    if found := _LIBRARY.search(log):
        return f"a shared library is missing: {_clean(found['reason'])}"
    if found := _MODEL.search(log):
        model, reason = found["model"], _clean(found["reason"])
        return reason if reason.startswith(f"{model}:") else f"{model}: {reason}"
    if found := _ENDPOINT.search(log):
        return f"Triton's {found['service']} service could not start: {_clean(found['reason'])}"
    if found := _ERROR.search(log):
        return _clean(found["reason"])
    return None


def _clean(text: str) -> str:
    """One line without quoting, status code and traceback. Triton logs messages as JSON strings, in places as text."""
    text = text.strip()
    if text.endswith('"'):
        try:
            text = json.loads(f'"{text}')
        except ValueError:
            text = text[:-1]
    return " ".join(_PREFIXES.sub("", text.split(_TRACEBACK)[0]).split())
