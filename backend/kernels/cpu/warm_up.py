"""Compile the CPU kernels before they are needed: `python -m backend.kernels.cpu.warm_up` (part of `make setup`).

Numba keeps the machine code beside the sources, or where NUMBA_CACHE_DIR says; later processes only load it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from backend.kernels import cpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def warm_up(dtype: torch.dtype) -> None:
    """Run each compiled kernel once with weights and KV cache of this type."""
    slots, weights = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    for size in (8, 32):  # lengths that bfloat16 instructions do not fit and do fit
        x = torch.zeros(1, size)
        cpu.linear(x, torch.zeros(4, size, dtype=dtype))
        w13, w2 = torch.zeros(1, 2 * size, size, dtype=dtype), torch.zeros(1, size, size, dtype=dtype)
        cpu.grouped_experts_forward(x, w13, w2, slots, weights)
    tables = (torch.zeros(1, dtype=torch.int64), torch.zeros(1), torch.zeros(1, dtype=torch.int8))
    cpu.remap_experts(slots, weights, *tables)
    cpu.select_experts(slots, weights, *tables, scores=torch.ones(1, 1))
    cache = torch.zeros(1, 1, 1, 8, dtype=dtype)
    table, lens = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    cpu.decode_attention(torch.zeros(1, 1, 8), cache, cache, table, lens, 1.0, None)


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(prog="backend.kernels.cpu.warm_up", description=__doc__.splitlines()[0]).parse_args(argv)
    started = time.monotonic()
    for dtype in DTYPES:
        warm_up(dtype)
        print(f"kernels for {dtype} are ready after {time.monotonic() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
