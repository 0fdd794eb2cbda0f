"""What the machine can do, measured in the same run, and the least time that an operation needs on it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch

from loadtest.bench.timing import median_s

_COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}
_MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
_DEFAULT_CACHE_BYTES = 2**25


class Cost(msgspec.Struct, frozen=True):
    """What an operation must move to or from memory, each byte once, and compute (a multiply-add is two FLOPs)."""

    bytes: int
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


class Floors(msgspec.Struct, frozen=True, kw_only=True):
    """Rates of one device. `matmul_flops_per_s` is by the operands' type."""

    copy_bytes_per_s: float
    read_bytes_per_s: float
    matmul_flops_per_s: dict[str, float]

    @property
    def bytes_per_s(self) -> float:
        """Copying moves every byte twice; where reading alone is quicker, an operation that mostly reads can be, too."""
        return max(self.copy_bytes_per_s, self.read_bytes_per_s)

    def flops_per_s(self, dtype: str) -> float:
        """The best rate open to a kernel with weights of this type: it may also widen them to float32."""
        return max(self.matmul_flops_per_s[dtype], self.matmul_flops_per_s["float32"])

    def seconds(self, cost: Cost, dtype: str) -> float:
        return max(cost.bytes / self.bytes_per_s, cost.flops / self.flops_per_s(dtype))

    def bound(self, cost: Cost, dtype: str) -> str:
        """Which of the two limits decides: `memory` or `compute`."""
        return "memory" if cost.bytes / self.bytes_per_s >= cost.flops / self.flops_per_s(dtype) else "compute"


def measure_floors(device: torch.device, dtype: torch.dtype, runs: int = 5, scale: float = 1.0) -> Floors:
    """Copy and read bandwidth, and the rates of square matrix products in float32 and `dtype`.

    `scale` shrinks the operands (tests).
    """
    elements = int(_COPY_BYTES[device.type] * scale) // 4
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    copy_s = median_s([lambda: target.copy_(source)], device, runs)
    read_s = median_s([lambda: source.sum()], device, runs)
    size = max(16, int(_MATMUL_SIZE[device.type] * scale ** (1 / 3)))
    rates = {}
    for kind in dict.fromkeys((torch.float32, dtype)):
        a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
        out = torch.empty_like(a)
        matmul_s = median_s([lambda a=a, b=b, out=out: torch.mm(a, b, out=out)], device, runs)
        rates[dtype_name(kind)] = 2 * size**3 / matmul_s
    return Floors(
        copy_bytes_per_s=2 * source.nbytes / copy_s, read_bytes_per_s=source.nbytes / read_s, matmul_flops_per_s=rates
    )


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]]
    except (OSError, ValueError, KeyError):
        return _DEFAULT_CACHE_BYTES


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
