"""What several GPU kernels need."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

#: Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 before the first import of triton), on CPU tensors.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b with float32 sums; float32 factors are not rounded."""
    if _INTERPRETED:
        # The interpreter holds bfloat16 as bit patterns, which it cannot multiply.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


def power_of_2(n: int) -> int:
    """The least power of 2 that is at least n (at least 1)."""
    return 1 << max(0, n - 1).bit_length()


@lru_cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; in the interpreter, those of no device in particular."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count
