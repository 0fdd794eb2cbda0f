"""Small tensors between host and device without the host waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

#: Parts of a packed copy begin at multiples of this: kernels read 16 bytes at once.
_ALIGNMENT = 16
#: torch rounds each allocation of pinned memory up to a power of 2.
_PINNED_BYTES = 2**30


class HostCopy:
    """Tensors of one device on their way to the host: begun now, in the order of the device's work; read when they are needed."""

    def __init__(self, device: torch.device, *tensors: Tensor) -> None:
        """Without tensors there is only the wait for the device."""
        self._event = None
        self._host = tensors
        if device.type == "cuda":
            self._host = tuple(host_buffer(tensor.shape, tensor.dtype) for tensor in tensors)
            for host, tensor in zip(self._host, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def numpy(self) -> list[np.ndarray]:
        """The values; waits, once for all of them, until the device has come to the copies."""
        if self._event is not None:
            self._event.synchronize()
        return [host.numpy() for host in self._host]


def host_buffer(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Pinned memory: a GPU reads and writes it while the host goes on."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def pinned(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies in pinned memory, packed: each by itself would be rounded up to a power of 2."""
    copies: dict[str, Tensor] = {}
    left = torch.empty(0, dtype=dtype)
    numbers_left = sum(tensor.numel() for tensor in tensors.values())
    for name, tensor in tensors.items():
        if tensor.numel() > len(left):
            piece = max(tensor.numel(), min(numbers_left, _PINNED_BYTES // dtype.itemsize))
            left = host_buffer((piece,), dtype)
        place, left = left[: tensor.numel()], left[tensor.numel() :]
        copies[name] = place.view(tensor.shape).copy_(tensor)
        numbers_left -= tensor.numel()
    return copies


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Contiguous arrays as tensors of the same types and shapes, in one copy."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    sizes = [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays]
    packed = host_buffer((sum(sizes),), torch.uint8)
    for part, array in zip(packed.split(sizes), arrays, strict=True):
        if array.nbytes:
            part[: array.nbytes].copy_(torch.frombuffer(bytearray(array.tobytes()), dtype=torch.uint8))
    # The allocator of pinned memory hands it out again only when the copy has been made.
    parts = packed.to(device, non_blocking=True).split(sizes)
    return [
        part[: array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for part, array in zip(parts, arrays, strict=True)
    ]
