"""Compile the CPU kernels before they are needed: `python -m backend.kernels.cpu.warm_up` (part of `make setup`).

Numba keeps the machine code beside the sources, or where NUMBA_CACHE_DIR says; later processes only load it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch

from backend.kernels import cpu
from backend.kernels.cpu.nucleus import sample_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def warm_up(dtype: torch.dtype) -> None:
    """Run each compiled kernel, the sampler's too, once; weights and KV cache are of this type."""
    slots, weights = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    for size in (8, 32):  # lengths that bfloat16 instructions do not fit and do fit
        cpu.linear(torch.zeros(1, size), torch.zeros(4, size, dtype=dtype))
        w13, w2 = torch.zeros(1, 2 * size, size, dtype=dtype), torch.zeros(1, size, size, dtype=dtype)
        for tokens in (1, 64):  # few and many rows
            cpu.grouped_experts_forward(
                torch.zeros(tokens, size), w13, w2, slots.expand(tokens, 1), weights.expand(tokens, 1)
            )
    tables = (torch.zeros(1, dtype=torch.int64), torch.zeros(1), torch.zeros(1, dtype=torch.int8))
    cpu.remap_experts(slots, weights, *tables)
    cpu.select_experts(slots, weights, *tables, scores=torch.ones(1, 1))
    cache = torch.zeros(1, 1, 1, 8, dtype=dtype)
    table, lens = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    cpu.decode_attention(torch.zeros(1, 1, 8), cache, cache, table, lens, 1.0, None)
    share = np.ones(1)
    sample_rows(np.ones((1, 8), np.float32), np.zeros(1, np.int64), share / 2, share, share, share)


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(prog="backend.kernels.cpu.warm_up", description=__doc__.splitlines()[0]).parse_args(argv)
    started = time.monotonic()
    for dtype in DTYPES:
        warm_up(dtype)
        print(f"kernels for {dtype} are ready after {time.monotonic() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
