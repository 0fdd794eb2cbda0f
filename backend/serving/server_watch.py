"""The end of a stub: with its server (Triton waits for its stubs, but killed it leaves them behind), or to have a new one."""

from __future__ import annotations

import logging
import os
import threading
import time

log = logging.getLogger(__name__)

_PERIOD_S = 1.0


def end_with_server() -> None:
    """From now on, end this process within a second or two of its parent, Triton, however that ends."""
    server_pid = os.getppid()

    def watch() -> None:
        while os.getppid() == server_pid:
            time.sleep(_PERIOD_S)
        os._exit(1)  # nothing to tidy up: what this process shares, it shares with the server

    threading.Thread(target=watch, name="server-watch", daemon=True).start()


def end_stub(reason: str) -> None:
    """End this process at once: the launcher then starts the server anew, and no client waits for what will not come."""
    log.critical("the stub ends itself: %s", reason)
    os._exit(1)
