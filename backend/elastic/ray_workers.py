"""Expert workers as Ray actors: started, placed and watched by Ray, on one host or several.

Ray is an optional extra. It carries only what is not urgent: starting workers and handing them weights; tokens go by
`backend.elastic.exchange`.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist

from backend.elastic.exchange import WORKER, Link, LinkError
from backend.elastic.expert_worker import ExpertWorker, WorkerShape
from backend.elastic.ray_remains import end_with_this_process
from backend.errors import ConfigError, UnreachableError
from backend.experts.weight_store import Source

log = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[2]
#: Seconds that Ray has to start an actor, which may have to compile its kernels, or to answer it.
_CALL_TIMEOUT_S = 150.0
_REACH_TIMEOUT_S = 5.0
#: Bytes of weights in one call, and of the memory through which a cluster of the engine's own passes them.
_CALL_BYTES = 64 * 2**20
_OBJECT_STORE_BYTES = 512 * 2**20
#: Ray's names of what a cluster has, and of what an actor needs.
_OPTIONS = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}


class RayActor:
    """What runs in an actor's process: a worker, and the thread that serves the engine."""

    def __init__(self, shape: WorkerShape, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self._device = torch.device(device)
        self._worker = ExpertWorker(shape, self._device)

    def meet(self, address: str, port: int, name: str) -> int:
        """Serve the engine that waits under `name` in the store there; returns this process's id."""
        import ray

        store = dist.TCPStore(address, port, is_master=False)
        own_address = ray.util.get_node_ip_address()
        threading.Thread(target=self._serve, args=(store, name, own_address), name="serve", daemon=True).start()
        return os.getpid()

    def put(self, experts: Sequence[tuple[int, int, Source]]) -> None:
        """See WorkerHandle."""
        for layer, expert, source in experts:
            self._worker.put(layer, expert, *source)

    def keep(self, experts: Sequence[Sequence[int]]) -> None:
        """See WorkerHandle."""
        for layer, kept in enumerate(experts):
            self._worker.keep(layer, kept)

    def _serve(self, store: dist.Store, name: str, own_address: str) -> None:
        status = 0
        try:
            self._worker.serve(Link(store, name, WORKER, own_address, self._device))
        except LinkError as error:
            log.info("the engine is gone: %s", error)
        except BaseException:
            log.exception("the worker failed")
            status = 1
        finally:
            # A worker without its engine is of no use, and one that failed must not look alive. What was logged is flushed.
            os._exit(status)


class RayHandle:
    """The engine's end of an actor."""

    def __init__(self, ray: ModuleType, actor) -> None:
        self._ray, self._actor = ray, actor
        self.pid = 0

    def meet(self, address: str, port: int, name: str) -> None:
        """See RayActor."""
        self.pid = self._call(self._actor.meet.remote(address, port, name))

    def put(self, experts: Sequence[tuple[int, int, Source]]) -> None:
        """See WorkerHandle."""
        for part in _parts(experts):
            self._call(self._actor.put.remote(part))

    def keep(self, experts: Sequence[Sequence[int]]) -> None:
        """See WorkerHandle."""
        self._call(self._actor.keep.remote(experts))

    def stop(self) -> None:
        """See WorkerHandle."""
        try:
            self._ray.kill(self._actor)
        except Exception as error:
            log.debug("a worker could not be ended, so it is gone: %s", error)

    def _call(self, reference):
        return self._ray.get(reference, timeout=_CALL_TIMEOUT_S)


class RayHost:
    """Starts workers on a Ray cluster."""

    def __init__(
        self, address: str, num_workers: int, cpus: int | None, shape: WorkerShape, device: torch.device
    ) -> None:
        """`address` of a running cluster; empty: one of this process's own, on this machine, which ends with it. `cpus`: cores
        and threads of a worker (default: 1, on a cluster of its own an equal share). `device` of the engine: beside one on a
        CUDA device every worker has such a device of its own.

        Raises ConfigError if Ray is not installed or the cluster has no room for so many workers, UnreachableError if it
        cannot be reached.
        """
        if device.type == "cuda" and not address:
            raise ConfigError(
                f"parameter expert_pool is workers:{num_workers} and the device {device}, which needs the parameter ray_address: a "
                "cluster whose GPUs are others than the engine's"
            )
        self._ray = _import_ray(num_workers)
        if address:
            where, self._cpus = f"the Ray cluster at {address} (parameter ray_address)", cpus or 1
        else:
            share = max(1, (os.cpu_count() or 1) // (num_workers + 1))
            where, self._cpus = "a Ray cluster on this machine", cpus or share
        is_new = not address and not self._ray.is_initialized()
        try:
            if address:
                _check_reachable(address)
                cluster = {"address": address}
            else:
                # Room for one more: a slow worker goes on until another one has taken its place.
                cluster = {"num_cpus": (num_workers + 1) * self._cpus, "object_store_memory": _OBJECT_STORE_BYTES}
                cluster["include_dashboard"] = False
            _connect(self._ray, cluster)
        except Exception as error:
            raise _unusable(where, error) from None
        if is_new:
            end_with_this_process()
        self._device = device.type
        #: What each worker needs, in Ray's words.
        self._needs: dict[str, float] = {"CPU": self._cpus}
        self._needs |= {"GPU": 1} if device.type == "cuda" else {"memory": shape.num_bytes}
        self._check_room(where, num_workers)
        self.address = self._ray.util.get_node_ip_address()

    def start(self, name: str, shape: WorkerShape, store_port: int) -> RayHandle:
        """See WorkerHost."""
        options = {_OPTIONS[kind]: amount for kind, amount in self._needs.items()}
        actor = self._ray.remote(RayActor).options(**options, max_restarts=0)
        handle = RayHandle(self._ray, actor.remote(shape, self._cpus, self._device))
        try:
            handle.meet(self.address, store_port, name)
        except self._ray.exceptions.GetTimeoutError:
            handle.stop()
            raise TimeoutError(
                f"Ray has not started a worker that needs {self._needs} within {_CALL_TIMEOUT_S:g} s"
            ) from None
        except BaseException:
            handle.stop()
            raise
        return handle

    def _check_room(self, where: str, num_workers: int) -> None:
        """Raise ConfigError if the cluster as a whole is too small: Ray would wait for it to grow."""
        there = self._ray.cluster_resources()
        for kind, needed in self._needs.items():
            if there.get(kind, 0) < num_workers * needed:
                raise ConfigError(
                    f"{where} has {there.get(kind, 0):g} of the resource {kind}, but {num_workers} workers need "
                    f"{num_workers * needed} (parameters expert_pool, worker_cpus, resident_experts)"
                )


def _import_ray(num_workers: int) -> ModuleType:
    """Ray, with the settings that it reads when it is imported. Raises ConfigError if it is not installed."""
    # By itself it tries for minutes to reach a cluster, reports its use to its makers, and has workers step back (nice 15)
    # behind everything else on the machine, although the engine waits for them.
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        import ray
    except ImportError:
        raise ConfigError(
            f"parameter expert_pool is workers:{num_workers}, which needs the package ray: install the extra workers "
            "(pip install ray), or use local or resident"
        ) from None
    return ray


def _connect(ray: ModuleType, cluster: dict[str, object]) -> None:
    """Join or start this cluster; this process goes on to handle SIGTERM as before: Ray would end it without draining."""
    former_handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            **cluster,
            namespace="experts",
            log_to_driver=False,
            configure_logging=False,
            ignore_reinit_error=True,
            runtime_env={"env_vars": {"PYTHONPATH": str(_ROOT), "OMP_WAIT_POLICY": "PASSIVE"}},
        )
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, former_handler)


def _unusable(where: str, error: Exception) -> ConfigError:
    """What to raise when a cluster could not be joined or started."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    # Ray's own kind of error: something listens there, but will not talk.
    if type(error) is ConnectionError and "RAY_AUTH_MODE" not in os.environ:
        reason += "; if it asks for a token, set RAY_AUTH_MODE=token for the server, too"
    kind = UnreachableError if isinstance(error, OSError) else ConfigError
    return kind(f"{where} cannot be used for expert workers: {reason}")


def _check_reachable(address: str) -> None:
    """Raise at once where Ray would try for a long time."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError("an address is host:port, or auto for the cluster of this machine")
    with socket.create_connection((host, int(port)), _REACH_TIMEOUT_S):
        pass


def _parts(experts: Sequence[tuple[int, int, Source]]) -> Iterator[list[tuple[int, int, Source]]]:
    """The experts in calls of bounded size; cloned, because a view would travel with all that it is a view of."""
    part, size = [], 0
    for layer, expert, source in experts:
        part.append((layer, expert, tuple(tensor.clone() for tensor in source)))
        size += sum(tensor.nbytes for tensor in source)
        if size >= _CALL_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part
