"""Waiting for what another process does."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(true: Callable[[], object], timeout_s: float = 60.0, what: str = "what was waited for") -> None:
    """Until `true()`; a failure that says `what` did not happen after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"after {timeout_s:g} s: not {what}"
        time.sleep(0.02)
