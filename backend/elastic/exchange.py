"""Tokens from an engine to an expert worker and back: torch.distributed, point to point, with timeouts.

An engine and each of its workers are a group of two: gloo on CPUs, NCCL between CUDA devices. A worker that dies or hangs so
fails one exchange with one peer, where a collective over all would hold up everybody, and one that joins needs no new group for
the others. Tensors travel as float32; each layer of a step costs one exchange each way: a header (layer, rows) with the rows, and
the rows' results.
"""

from __future__ import annotations

import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

CPU = torch.device("cpu")
ENGINE, WORKER = 0, 1
_STOP = -1
#: A worker waits as long as the engine lets it: an engine that is gone closes the connection.
_FOREVER = timedelta(days=365)
_LEAST = timedelta(milliseconds=1)  # 0 would mean for ever
#: Between two looks at a CUDA device.
_POLL_S = 5e-5


class LinkError(RuntimeError):
    """The peer is gone or has not answered in time; the link is of no more use."""


class Link:
    """One end of the connection between an engine and one worker."""

    def __init__(
        self,
        store: dist.Store,
        name: str,
        rank: int,
        host: str,
        device: torch.device = CPU,
        start_timeout_s: float = 60.0,
    ) -> None:
        """Meets the other end under `name` in the store; `host` is this end's address, as the other reaches it. `device`: where
        tensors are, at both ends a CPU or at both a CUDA device of its own.

        Raises LinkError if the other end does not come within `start_timeout_s`.
        """
        self.device, self._peer = device, 1 - rank
        connect = _connect_nccl if device.type == "cuda" else _connect_gloo
        try:
            self._group = connect(dist.PrefixStore(name, store), rank, host, timedelta(seconds=start_timeout_s))
        except RuntimeError as error:
            raise LinkError(f"the other end of {name} did not come: {_reason(error)}") from None
        self._sent: list[dist.Work] = []  # they hold the tensors that are on their way
        self._results = torch.empty(0)  # [R, M], to be filled
        self._received: dist.Work | None = None

    # --- the engine's end -----------------------------------------------------------------------------------------

    def begin(self, layer: int, rows: Tensor, result_width: int) -> None:
        """Send rows [R, W] float32 of a layer and ask for their results; does not wait."""
        self._results = torch.empty(len(rows), result_width, device=self.device)
        try:
            self._sent = [self._send(torch.tensor([layer, len(rows)], device=self.device)), self._send(rows)]
            self._received = self._group.recv([self._results], self._peer, 0)
        except RuntimeError as error:
            raise LinkError(_reason(error)) from None

    def finish(self, deadline: float) -> Tensor:
        """The results [R, M] float32 of the rows sent last, which must be there by `deadline` (time.monotonic())."""
        assert self._received is not None
        self._wait(self._received, max(_LEAST, timedelta(seconds=deadline - time.monotonic())))
        return self._results

    def stop(self) -> None:
        """Tell the worker to end, if it listens."""
        try:
            self._sent = [self._send(torch.tensor([_STOP, 0], device=self.device))]
            self._wait(self._sent[0], timedelta(seconds=1))
        except RuntimeError:
            pass  # it is gone

    # --- the worker's end -----------------------------------------------------------------------------------------

    def receive_rows(self, width: int) -> tuple[int, Tensor] | None:
        """The layer and its rows [R, width], however long it takes; None: the engine wants the worker to end."""
        header = torch.empty(2, dtype=torch.int64, device=self.device)
        self._receive(header)
        layer, count = header.tolist()
        if layer == _STOP:
            return None
        rows = torch.empty(count, width, device=self.device)
        self._receive(rows)
        return layer, rows

    def send_results(self, results: Tensor) -> None:
        """results [R, M] float32 of the rows received last."""
        try:
            sent = self._send(results)
        except RuntimeError as error:
            raise LinkError(_reason(error)) from None
        self._wait(sent, _FOREVER)

    def _receive(self, tensor: Tensor) -> None:
        try:
            received = self._group.recv([tensor], self._peer, 0)
        except RuntimeError as error:
            raise LinkError(_reason(error)) from None
        self._wait(received, _FOREVER)

    def _send(self, tensor: Tensor) -> dist.Work:
        return self._group.send([tensor.contiguous()], self._peer, 0)

    def _wait(self, work: dist.Work, timeout: timedelta) -> None:
        try:
            if self.device.type == "cpu":
                work.wait(timeout)
                return
            # NCCL's wait() only has the stream wait, for ever.
            deadline = time.monotonic() + timeout.total_seconds()
            while not work.is_completed():
                if time.monotonic() >= deadline:
                    self._group.abort()
                    raise LinkError(f"no answer within {timeout.total_seconds():g} s")
                time.sleep(_POLL_S)
        except RuntimeError as error:
            raise LinkError(_reason(error)) from None


def _reason(error: RuntimeError) -> str:
    """The message without the place in gloo's source before it and the advice after it."""
    return str(error).split("] ", 1)[-1].split(". ", 1)[0]


def _connect_gloo(store: dist.Store, rank: int, host: str, timeout: timedelta) -> dist.ProcessGroupGloo:
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    return dist.ProcessGroupGloo(store, rank, 2, options)


def _connect_nccl(store: dist.Store, rank: int, host: str, timeout: timedelta):
    """Connects with the first exchange; NCCL finds addresses itself (NCCL_SOCKET_IFNAME)."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, 2, options)
