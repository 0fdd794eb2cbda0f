"""Memory of this process, from Linux's accounts."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import msgspec
import psutil
import torch


class Memory(msgspec.Struct, kw_only=True):
    """Peak memory of the engine and what it is made of.

    On a GPU the peak is of the device and nothing was there before; on a CPU it is the resident peak of the process.
    """

    peak_bytes: int
    #: Before the model was loaded: interpreter, libraries and the machine code of the kernels.
    before_bytes: int
    #: The checkpoint's weights, and those of united experts.
    weight_bytes: int
    united_bytes: int
    kv_pool_bytes: int
    #: The rest at the peak: intermediate results of a step, the matrix library's code and buffers, what the allocator keeps.
    other_bytes: int
    #: (peak - before) / (weights + united experts + KV pool).
    ratio: float
    #: peak / (weights + united experts + KV pool).
    ratio_with_libraries: float

    @classmethod
    def of(cls, *, peak: int, before: int, weights: int, united: int, kv_pool: int) -> Memory:
        held = weights + united + kv_pool
        return cls(
            peak_bytes=peak,
            before_bytes=before,
            weight_bytes=weights,
            united_bytes=united,
            kv_pool_bytes=kv_pool,
            other_bytes=peak - before - held,
            ratio=(peak - before) / held,
            ratio_with_libraries=peak / held,
        )

    def __str__(self) -> str:
        parts = [
            ("before the model", self.before_bytes),
            ("weights", self.weight_bytes),
            ("united experts", self.united_bytes),
            ("KV pool", self.kv_pool_bytes),
            ("the rest", self.other_bytes),
        ]
        listed = ", ".join(f"{name} {mib(size)}" for name, size in parts)
        return (
            f"Peak memory {mib(self.peak_bytes)}: {listed}. Of weights and KV pool: {self.ratio:.2f}, "
            f"with what was there before the model {self.ratio_with_libraries:.2f}"
        )


class Growth(msgspec.Struct, kw_only=True):
    """Resident memory over many steps."""

    steps: int
    warm_up_steps: int
    rss_after_warm_up_bytes: int
    rss_end_bytes: int
    growth_bytes: int


def mib(number: int) -> str:
    return f"{number / 2**20:.0f} MiB"


def rss_bytes() -> int:
    """Resident memory of this process now."""
    return psutil.Process().memory_info().rss


def reset_peak() -> None:
    """Begin a new peak of device memory, and of resident memory where the system can (Linux's clear_refs)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # without it the peak since the start of the process is an upper bound
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Peak device memory of this process (GPU), or its peak resident memory (CPU), since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
