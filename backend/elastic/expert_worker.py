"""An expert worker: holds copies of experts and runs the rows that an engine sends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backend.elastic.exchange import Link
from backend.experts.weight_store import ExpertWeights
from backend.kernels import kernels_for

_ABSENT = -1


@dataclass(frozen=True)
class WorkerShape:
    """What a worker has room for: `capacity` experts of each layer."""

    num_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    expert_size: int
    capacity: int
    dtype: torch.dtype = torch.float32

    @property
    def num_bytes(self) -> int:
        """Bytes of the experts that a worker has room for."""
        return self.num_layers * self.capacity * self.expert_bytes

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return 3 * self.hidden_size * self.expert_size * self.dtype.itemsize

    @property
    def row_width(self) -> int:
        """Numbers of a row: hidden [M], experts [K] (-1: none) and gate weights [K]."""
        return self.hidden_size + 2 * self.top_k


class ExpertWorker:
    """Copies of experts by layer. `put` and `keep` may be called while `serve` runs in another thread."""

    def __init__(self, shape: WorkerShape, device: torch.device) -> None:
        self.shape, self._device, self._kernels = shape, device, kernels_for(device)
        self._weights = [
            ExpertWeights(shape.capacity, shape.hidden_size, shape.expert_size, shape.dtype, device)
            for _ in range(shape.num_layers)
        ]
        if device.type == "cpu":
            from backend.kernels.cpu.warm_up import warm_up

            warm_up(shape.dtype)  # loads machine code, or compiles it: not while an engine waits
        #: [E] slot of each expert by layer; a table is replaced, never changed, so that a running layer keeps the one it has.
        self._slots = [torch.full((shape.num_experts,), _ABSENT) for _ in range(shape.num_layers)]

    def put(self, layer: int, expert: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Take an expert's gate and up [I, M] and down [M, I]. Raises MemoryError, and nothing changes, if there is no room."""
        slots = self._slots[layer]
        if slots[expert] != _ABSENT:
            return
        free = set(range(self.shape.capacity)) - set(slots.tolist())
        if not free:
            raise MemoryError(
                f"this worker has room for {self.shape.capacity} experts of layer {layer}, and all of it is used"
            )
        slot = min(free)
        self._weights[layer].put(slot, gate, up, down)
        changed = slots.clone()
        changed[expert] = slot
        self._slots[layer] = changed

    def keep(self, layer: int, experts: Sequence[int]) -> None:
        """Forget the layer's other experts; the engine has sent the last row for them."""
        changed = torch.full_like(self._slots[layer], _ABSENT)
        changed[list(experts)] = self._slots[layer][list(experts)]
        self._slots[layer] = changed

    def run(self, layer: int, rows: Tensor) -> Tensor:
        """rows [R, row_width] -> weighted sums [R, M] of their experts' outputs. Raises KeyError for an expert it has not."""
        size, top_k = self.shape.hidden_size, self.shape.top_k
        hidden, experts, gates = rows.to(self._device).split((size, top_k, top_k), dim=1)
        wanted = experts.long()
        slots = torch.where(wanted >= 0, self._slots[layer].to(self._device)[wanted.clamp(min=0)], _ABSENT)
        if ((slots < 0) & (wanted >= 0)).any():
            raise KeyError(f"layer {layer} was asked for experts that this worker does not hold")
        weights = self._weights[layer]
        run = self._kernels.grouped_experts_forward
        out = run(hidden.to(self.shape.dtype).contiguous(), weights.w13, weights.w2, slots, gates.contiguous())
        return out.float()

    @torch.inference_mode()
    def serve(self, link: Link) -> None:
        """Run what comes until the engine stops it. Raises LinkError if the engine is gone."""
        while (received := link.receive_rows(self.shape.row_width)) is not None:
            link.send_results(self.run(*received).to(link.device))
