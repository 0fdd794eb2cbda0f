"""The stacked weights of one MoE layer's experts: one tensor per projection, one row of it per slot."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np
import torch
from torch import Tensor

_LIBC = ctypes.CDLL(None)
LARGEST_FLOAT8 = torch.finfo(torch.float8_e4m3fn).max
#: gate [I, M], up [I, M], down [M, I] of one expert, wherever they lie.
Source = tuple[Tensor, Tensor, Tensor]


class ExpertWeights:
    """w13 [P, 2 * I, M] (gate rows above up rows) and w2 [P, M, I] for P slots."""

    def __init__(
        self, num_slots: int, hidden_size: int, expert_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.expert_size = expert_size
        self.w13 = torch.empty(num_slots, 2 * expert_size, hidden_size, dtype=dtype, device=device)
        self.w2 = torch.empty(num_slots, hidden_size, expert_size, dtype=dtype, device=device)
        #: Factors [P, 2 * I] and [P, M] float32 of the rows of w13 and w2, if these are quantised.
        self.scales: tuple[Tensor, Tensor] | None = None

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in (self.w13, self.w2, *(self.scales or ())))

    def append(self, w13: Tensor, w2: Tensor) -> slice:
        """More slots, with these weights [n, 2 * I, M] and [n, M, I]; returns which. The tensors are replaced, as in `widen`."""
        first = len(self.w13)
        # Both before either goes: a device's allocator would put the second into what the first one leaves, and could not
        # give the rest of that back.
        self.w13, self.w2 = torch.cat([self.w13, w13]), torch.cat([self.w2, w2])
        return slice(first, len(self.w13))

    def quantize(self) -> None:
        """Store weights as float8 (e4m3) with a factor for each output row; the tensors are replaced, as in `widen`."""
        # Both before either goes, as in `append`.
        (w13, scale_13), (w2, scale_2) = _quantized(self.w13), _quantized(self.w2)
        self.w13, self.w2, self.scales = w13, w2, (scale_13, scale_2)

    def widen(self, times: int) -> None:
        """Repeat every intermediate neuron `times` times and divide w2 by it: the same function, `times` the cost.

        The tensors are replaced, so this belongs before anything holds on to them. One of them is held twice meanwhile.
        """
        num_slots, hidden_size, size = self.w2.shape
        w13 = self.w13.view(num_slots, 2, size, hidden_size).repeat_interleave(times, dim=2)
        self.w13 = w13.view(num_slots, 2 * size * times, hidden_size)
        self.w2 = (self.w2 / times).repeat_interleave(times, dim=2)
        self.expert_size = size * times

    def put(self, slot: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Copy an expert's gate and up [I, M] and down [M, I], not widened and from any device, into a slot."""
        times, size = self.expert_size // len(gate), len(gate)
        parts = [
            (self.gate(slot).unflatten(0, (size, times)), gate.unsqueeze(1)),
            (self.up(slot).unflatten(0, (size, times)), up.unsqueeze(1)),
            (
                self.down(slot).unflatten(1, (size, times)),
                (down if times == 1 else down.to(self.w2.dtype) / times).unsqueeze(2),
            ),
        ]
        for place, part in parts:
            if place.device.type == part.device.type == "cpu" and place.dtype == part.dtype:
                # torch would have all cores help, which the running step needs.
                np.copyto(_bits(place), _bits(part))
            else:
                place.copy_(part, non_blocking=True)

    def release(self, slots: slice) -> None:
        """Give the memory of these slots back to the system until they are filled again; what was in them is lost.

        On a CPU under Linux only: a CUDA device's memory stays allocated.
        """
        for part in (self.w13[slots], self.w2[slots]):
            if part.device.type == "cpu" and sys.platform == "linux":
                first, last = -(-part.data_ptr() // mmap.PAGESIZE), (part.data_ptr() + part.nbytes) // mmap.PAGESIZE
                if last > first:
                    _LIBC.madvise(
                        ctypes.c_void_p(first * mmap.PAGESIZE),
                        ctypes.c_size_t((last - first) * mmap.PAGESIZE),
                        mmap.MADV_DONTNEED,
                    )

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return (self.w13.shape[1:].numel() + self.w2.shape[1:].numel()) * self.w13.element_size()

    def gate(self, slot: int) -> Tensor:
        """View [I, M] of a slot's gate projection."""
        return self.w13[slot, : self.expert_size]

    def up(self, slot: int) -> Tensor:
        """View [I, M] of a slot's up projection."""
        return self.w13[slot, self.expert_size :]

    def down(self, slot: int) -> Tensor:
        """View [M, I] of a slot's down projection."""
        return self.w2[slot]


def _bits(tensor: Tensor) -> np.ndarray:
    """The tensor's memory; numpy knows no bfloat16."""
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]).numpy()


def _quantized(weights: Tensor) -> tuple[Tensor, Tensor]:
    """float8 [P, R, C] and float32 factors [P, R] of weights [P, R, C]: the largest of a row becomes the largest float8."""
    stored = torch.empty(weights.shape, dtype=torch.float8_e4m3fn, device=weights.device)
    scales = torch.empty(weights.shape[:2], dtype=torch.float32, device=weights.device)
    for slot, matrix in enumerate(weights):  # one after the other: in float32 a layer at once would take gigabytes
        wide = matrix.float()
        largest = wide.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny * LARGEST_FLOAT8)
        scales[slot] = largest / LARGEST_FLOAT8
        stored[slot] = (wide / scales[slot].unsqueeze(1)).to(torch.float8_e4m3fn)
    return stored, scales
