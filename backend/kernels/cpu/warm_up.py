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
from backend.kernels.cpu.compiled import FEW_NUMBERS
from backend.kernels.cpu.nucleus import sample_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def warm_up(dtype: torch.dtype) -> None:
    """Run each compiled kernel, the sampler's too, once; weights and KV cache are of this type."""
    slots, weights = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    for size in (8, 32):  # lengths that bfloat16 instructions do not fit and do fit
        matrix = torch.zeros(2 * size, size, dtype=dtype)
        for tokens in (1, 16, 64):  # few and many rows
            cpu.linear(torch.zeros(tokens, size), matrix)
            cpu.linear(torch.zeros(tokens, size), matrix[:8])  # too few rows for a matrix unit
            args = torch.zeros(tokens, size), matrix[None], matrix[None, :size]
            cpu.grouped_experts_forward(*args, slots.expand(tokens, 1), weights.expand(tokens, 1))
        _warm_up_attention(dtype, size)
    for tokens in (1, 2 * FEW_NUMBERS // 32):  # for one thread and for all
        x, vector = torch.zeros(tokens, 32), torch.ones(32)
        cpu.rms_norm(x, vector, 1.0)
        cpu.add_rms_norm(x, x.clone(), vector, 1.0)
        cpu.route(x, torch.zeros(32, 32, dtype=dtype), None, 1, False)
    tables = (torch.zeros(1, dtype=torch.int64), torch.zeros(1), torch.zeros(1, dtype=torch.int8))
    cpu.remap_experts(slots, weights, *tables)
    cpu.select_experts(slots, weights, *tables, scores=torch.ones(1, 1))
    share = np.ones(1)
    sample_rows(np.ones((1, 8), np.float32), np.zeros(1, np.int64), share / 2, share, share, share)


def _warm_up_attention(dtype: torch.dtype, head_dim: int) -> None:
    cache, table = torch.zeros(1, 8, 1, head_dim, dtype=dtype), torch.zeros(1, 1, dtype=torch.int32)
    q, angles = torch.zeros(1, 1, head_dim), torch.zeros(1, head_dim // 2)
    cpu.decode_attention(q, cache, cache, table, torch.ones(1, dtype=torch.int32), 1.0, None)
    cpu.prefill_attention(q, cache, cache, table, [1], [1], 1.0, None)
    for kv_heads in (1, 2 * FEW_NUMBERS // (3 * head_dim)):  # for one thread and for all
        cache, heads = cache.new_zeros(1, 1, kv_heads, head_dim), torch.zeros(1, 3 * kv_heads, head_dim)
        cpu.rotate_and_store(heads, angles, angles, cache, cache.clone(), torch.zeros(1, dtype=torch.int64))


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(prog="backend.kernels.cpu.warm_up", description=__doc__.splitlines()[0]).parse_args(argv)
    started = time.monotonic()
    for dtype in DTYPES:
        warm_up(dtype)
        print(f"kernels for {dtype} are ready after {time.monotonic() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
