"""A stub that ends with its server: Triton waits for its stubs, but killed it leaves them behind."""

from __future__ import annotations

import os
import threading
import time

_PERIOD_S = 1.0


def end_with_server() -> None:
    """From now on, end this process within a second or two of its parent, Triton, however that ends."""
    server_pid = os.getppid()

    def watch() -> None:
        while os.getppid() == server_pid:
            time.sleep(_PERIOD_S)
        os._exit(1)  # nothing to tidy up: what this process shares, it shares with the server

    threading.Thread(target=watch, name="server-watch", daemon=True).start()
