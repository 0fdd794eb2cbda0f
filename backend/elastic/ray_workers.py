"""Expert workers as Ray actors: started, placed and watched by Ray, on one host or several.

Ray is an optional extra. It carries only what is not urgent: starting workers and handing them weights; tokens go by
`backend.elastic.exchange`.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from backend.elastic.exchange import WORKER, Link, LinkError
from backend.elastic.expert_worker import ExpertWorker, WorkerShape
from backend.errors import ConfigError
from backend.experts.resident import Source

log = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[2]
#: Seconds that Ray has to start an actor or to answer it.
_CALL_TIMEOUT_S = 150.0


class RayActor:
    """What runs in an actor's process: a worker, and the thread that serves the engine."""

    def __init__(self, shape: WorkerShape, threads: int) -> None:
        torch.set_num_threads(threads)
        self._worker = ExpertWorker(shape, torch.device("cpu"))

    def meet(self, host: str, port: int, name: str, timeout_s: float) -> int:
        """Serve the engine that waits under `name` in the store; returns this process's id."""
        store = dist.TCPStore(host, port, is_master=False)
        threading.Thread(target=self._serve, args=(store, name, timeout_s), name="serve", daemon=True).start()
        return os.getpid()

    def put(self, experts: Sequence[tuple[int, int, Source]]) -> None:
        """See WorkerHandle."""
        for layer, expert, source in experts:
            self._worker.put(layer, expert, *source)

    def drop(self, experts: Sequence[tuple[int, int]]) -> None:
        """See WorkerHandle."""
        for layer, expert in experts:
            self._worker.drop(layer, expert)

    def _serve(self, store: dist.Store, name: str, timeout_s: float) -> None:
        try:
            self._worker.serve(Link(store, name, WORKER, timeout_s))
        except LinkError as error:
            log.info("the engine is gone: %s", error)
        finally:
            # A worker without its engine is of no use, and one that failed must not look alive.
            os._exit(0)


class RayHandle:
    """The engine's end of an actor."""

    def __init__(self, ray, actor, pid: int) -> None:
        self._ray, self._actor, self.pid = ray, actor, pid

    def put(self, experts: Sequence[tuple[int, int, Source]]) -> None:
        """See WorkerHandle."""
        # Clones: a view would travel with all that it is a view of.
        copies = [(layer, e, tuple(part.clone() for part in source)) for layer, e, source in experts]
        self._ray.get(self._actor.put.remote(copies), timeout=_CALL_TIMEOUT_S)

    def drop(self, experts: Sequence[tuple[int, int]]) -> None:
        """See WorkerHandle."""
        self._ray.get(self._actor.drop.remote(list(experts)), timeout=_CALL_TIMEOUT_S)

    def stop(self) -> None:
        """See WorkerHandle."""
        try:
            self._ray.kill(self._actor)
        except Exception as error:
            log.debug("a worker could not be ended, so it is gone: %s", error)


class RayHost:
    """Starts workers on a Ray cluster."""

    def __init__(self, address: str, num_workers: int, cpus_per_worker: float) -> None:
        """`address` of a running cluster; empty: one of this process's own, on this machine, which ends with it.

        Raises ConfigError if Ray is not installed or the cluster cannot be reached.
        """
        try:
            import ray
        except ImportError:
            raise ConfigError(
                f"parameter expert_pool is workers:{num_workers}, which needs the package ray: install the extra elastic "
                "(pip install ray), or use local or resident"
            ) from None
        self._ray, self._cpus = ray, cpus_per_worker
        options = {"address": address} if address else {"num_cpus": os.cpu_count(), "include_dashboard": False}
        try:
            ray.init(
                **options,
                namespace="experts",
                log_to_driver=False,
                configure_logging=False,
                ignore_reinit_error=True,
                runtime_env={"env_vars": {"PYTHONPATH": str(_ROOT), "OMP_WAIT_POLICY": "PASSIVE"}},
            )
        except Exception as error:
            where = (
                f"the Ray cluster at {address} (parameter ray_address)" if address else "a Ray cluster on this machine"
            )
            raise ConfigError(f"{where} cannot be used for expert workers: {error}") from None

    def start(self, name: str, shape: WorkerShape, store_port: int, timeout_s: float) -> RayHandle:
        """See WorkerHost."""
        threads = max(1, int(self._cpus))
        actor = self._ray.remote(RayActor).options(num_cpus=self._cpus, max_restarts=0).remote(replace(shape), threads)
        handle = RayHandle(self._ray, actor, 0)
        try:
            host = self._ray.util.get_node_ip_address()
            met = actor.meet.remote(host, store_port, name, timeout_s)
            handle.pid = self._ray.get(met, timeout=_CALL_TIMEOUT_S)
        except BaseException:
            handle.stop()
            raise
        return handle
