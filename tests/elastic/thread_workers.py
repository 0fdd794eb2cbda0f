"""Expert workers in threads of this process: the same exchange as between processes, and faults on purpose."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from backend.elastic.exchange import WORKER, Link, LinkError
from backend.elastic.expert_worker import ExpertWorker, WorkerShape

ADDRESS = "127.0.0.1"


class ThreadHandle:
    """A worker in a thread, which can be made to die, to hang or to lack memory."""

    def __init__(self, name: str, shape: WorkerShape, port: int) -> None:
        self.worker = ExpertWorker(shape, torch.device("cpu"))
        self.before_run: Callable[[], object] = lambda: None
        self.before_put: Callable[[], object] = lambda: None
        self.stopped = False
        run = self.worker.run

        def hooked(layer: int, rows: Tensor) -> Tensor:
            self.before_run()
            return run(layer, rows)

        self.worker.run = hooked  # type: ignore[method-assign]
        threading.Thread(target=self._serve, args=(name, port), daemon=True).start()

    def _serve(self, name: str, port: int) -> None:
        store = dist.TCPStore(ADDRESS, port, is_master=False, timeout=timedelta(seconds=10))
        # The link ends with this call: its peer sees a closed connection.
        with contextlib.suppress(LinkError, ZeroDivisionError):
            self.worker.serve(Link(store, name, WORKER, ADDRESS))

    def die_in_the_next_layer(self) -> None:
        self.before_run = lambda: 1 / 0

    def put(self, experts) -> None:
        self.before_put()
        for layer, expert, source in experts:
            self.worker.put(layer, expert, *source)

    def keep(self, experts: Sequence[Sequence[int]]) -> None:
        for layer, kept in enumerate(experts):
            self.worker.keep(layer, kept)

    def stop(self) -> None:
        self.stopped = True


class ThreadHost:
    """A WorkerHost. `handles` are the latest workers by number; `started` counts all."""

    address = ADDRESS

    def __init__(self) -> None:
        self.handles: dict[int, ThreadHandle] = {}
        self.started = 0
        self.refuses: set[int] = set()

    def start(self, name: str, shape: WorkerShape, store_port: int) -> ThreadHandle:
        worker = int(name.split("-")[1])
        if worker in self.refuses:
            raise OSError("the cluster is gone")
        self.handles[worker] = ThreadHandle(name, shape, store_port)
        self.started += 1
        return self.handles[worker]
