"""Memory of this process, from Linux's accounts."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import msgspec
import psutil
import torch


class Memory(msgspec.Struct, kw_only=True):
    """Peak memory of the engine beside what it must hold.

    On a GPU the peak is of the device and nothing was there before; on a CPU it is the resident peak of the process, which
    had `before_bytes` (interpreter and libraries) when the engine was made.
    """

    peak_bytes: int
    before_bytes: int
    weight_bytes: int
    kv_pool_bytes: int
    #: (peak - before) / (weights + KV pool).
    ratio: float
    #: peak / (weights + KV pool).
    ratio_with_libraries: float

    @classmethod
    def of(cls, peak: int, before: int, weights: int, kv_pool: int) -> Memory:
        held = weights + kv_pool
        return cls(
            peak_bytes=peak,
            before_bytes=before,
            weight_bytes=weights,
            kv_pool_bytes=kv_pool,
            ratio=(peak - before) / held,
            ratio_with_libraries=peak / held,
        )


class Growth(msgspec.Struct, kw_only=True):
    """Resident memory over many steps."""

    steps: int
    warm_up_steps: int
    rss_after_warm_up_bytes: int
    rss_end_bytes: int
    growth_bytes: int


def rss_bytes() -> int:
    """Resident memory of this process now."""
    return psutil.Process().memory_info().rss


def reset_peak() -> None:
    """Begin a new peak of resident memory, where the system can (Linux's clear_refs)."""
    with contextlib.suppress(OSError):  # without it the peak since the start of the process is an upper bound
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Peak device memory of this process (GPU), or its peak resident memory since `reset_peak` (CPU)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
