"""Tokens from an engine to an expert worker and back: torch.distributed, point to point, with timeouts.

An engine and each of its workers are a group of two (gloo). A worker that dies or hangs so fails one exchange with one peer,
where a collective over all would hold up everybody, and one that joins needs no new group for the others. Tensors travel as
float32; each layer of a step costs one exchange each way: a header (layer, rows) with the rows, and the rows' results.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

ENGINE, WORKER = 0, 1
_STOP = -1
_FOREVER = timedelta(days=365)


class LinkError(RuntimeError):
    """The peer is gone or has not answered in time; the link is of no more use."""


class Link:
    """One end of the connection between an engine and one worker."""

    def __init__(
        self, store: dist.Store, name: str, rank: int, timeout_s: float, start_timeout_s: float = 60.0
    ) -> None:
        """Meets the other end under `name` in the store. Raises LinkError if it does not come within `start_timeout_s`;
        `timeout_s` is that of an exchange."""
        self._peer, self._timeout = 1 - rank, timedelta(seconds=timeout_s)
        try:
            self._group = dist.ProcessGroupGloo(
                dist.PrefixStore(name, store), rank, 2, timedelta(seconds=start_timeout_s)
            )
        except RuntimeError as error:
            raise LinkError(f"the other end of {name} did not come: {error}") from None

    def send_rows(self, layer: int, rows: Tensor) -> None:
        """rows [R, W] float32 for a layer."""
        self._send(torch.tensor([layer, len(rows)]))
        self._send(rows)

    def receive_rows(self, width: int) -> tuple[int, Tensor] | None:
        """The layer and its rows [R, width], however long it takes; None: the other end wants to stop."""
        header = torch.empty(2, dtype=torch.int64)
        self._receive(header, _FOREVER)
        layer, count = header.tolist()
        if layer == _STOP:
            return None
        rows = torch.empty(count, width)
        self._receive(rows, self._timeout)
        return layer, rows

    def send_results(self, results: Tensor) -> None:
        """results [R, M] float32 of the rows received last."""
        self._send(results)

    def receive_results(self, results: Tensor) -> None:
        """Fill results [R, M] float32 of the rows sent last."""
        self._receive(results, self._timeout)

    def stop(self) -> None:
        """Tell a worker to end."""
        self._send(torch.tensor([_STOP, 0]))

    def _send(self, tensor: Tensor) -> None:
        try:
            self._group.send([tensor.contiguous()], self._peer, 0).wait(self._timeout)
        except RuntimeError as error:
            raise LinkError(str(error)) from None

    def _receive(self, tensor: Tensor, timeout: timedelta) -> None:
        try:
            self._group.recv([tensor], self._peer, 0).wait(timeout)
        except RuntimeError as error:
            raise LinkError(str(error)) from None
