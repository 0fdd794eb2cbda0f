"""Compile every GPU kernel at the sizes of one model and print what each uses: `compile_all.py SHAPE ARCHITECTURE`.

A process of its own, because Triton's interpreter and compiler cannot share one. Prints a JSON list.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from compile_for import CompileOnly

from backend.kernels import gpu
from backend.kernels.gpu import attention_prefill, router
from backend.kernels.gpu.attention_decode import attend_in_splits
from backend.kernels.reference.shared_slots import SharedSlots
from backend.models.dummy import PREFIX, raw_config
from backend.models.moe import FOLDED_ROWS, num_folded
from backend.models.registry import parse_config

BLOCK_SIZE, NUM_BLOCKS, TABLE = 16, 1024, 256
DECODE_ROWS, PREFILL_ROWS = (1, 16, 64), 4096
CLASSES = 4


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_all(shape: str, architecture: int) -> None:
    """What a decode step and a prefill step of the model launch."""
    config = parse_config(raw_config(PREFIX + shape))
    hidden, heads, groups, dim = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    num_experts, size, top_k = config.num_experts, config.expert_size, config.top_k
    slots = num_experts + num_experts // 8
    shared = num_folded(config)
    w13, w2 = meta(slots, 2 * size, hidden), meta(slots, hidden, size)
    cache = meta(NUM_BLOCKS, BLOCK_SIZE, groups, dim)
    long, wide = {"dtype": torch.int64}, {"dtype": torch.float32}
    for rows in (*DECODE_ROWS, PREFILL_ROWS):
        gpu.grouped_experts_forward(
            meta(rows, hidden), w13, w2, meta(rows, top_k, **long), meta(rows, top_k, dtype=torch.float32)
        )
        if architecture >= 89:  # experts in 8 bits
            eight = [meta(*w.shape, dtype=torch.float8_e4m3fn) for w in (w13, w2)]
            scales = (meta(slots, 2 * size, **wide), meta(slots, hidden, **wide))
            gpu.grouped_experts_forward(
                meta(rows, hidden), *eight, meta(rows, top_k, **long), meta(rows, top_k, **wide), scales
            )
        if shared:
            gpu.add_shared_slots(
                meta(rows, hidden),
                meta(1, hidden),
                meta(rows, top_k, **long),
                meta(rows, top_k, **wide),
                slots,
                shared,
                meta(dtype=torch.int32),
            )
    for rows in (DECODE_ROWS[0], DECODE_ROWS[-1], PREFILL_ROWS):  # a size of 1 is a constant to the compiler
        x = meta(rows, hidden)
        gpu.add_rms_norm(x, x, meta(hidden), 1e-6)
        gpu.rms_norm(x, meta(hidden), 1e-6)
        choice = (meta(rows, top_k + shared, **long), meta(rows, top_k + shared, **wide))
        gpu.experts_add_rms_norm(x, w13, w2, *choice, x, meta(hidden), 1e-6)
        qkv, angles = meta(rows, heads + 2 * groups, dim), meta(rows, dim // 2)
        norms = (meta(dim), meta(dim)) if config.qk_norm == "head" else ()
        gpu.rotate_and_store(qkv, angles, angles, cache, cache, meta(rows, **long), *norms)
        gpu.apply_rope(qkv[:, :heads], angles, angles)
        gpu.store_kv(qkv[:, :groups], qkv[:, groups : 2 * groups], cache, cache, meta(rows, **long))
        with mock.patch.object(router, "router_logits", lambda x, w: meta(len(x), len(w), dtype=torch.float32)):
            experts, weights = gpu.route(x, meta(num_experts, hidden), None, top_k, config.norm_topk_prob)
        for mechanism, ranking in (("united", "count"), ("united", "gate_mass"), ("united_top_k", "count")):
            gpu.remap_experts(
                experts,
                weights,
                meta(num_experts, **long),
                meta(CLASSES, dtype=torch.float32),
                meta(rows, dtype=torch.int8),
                meta(dtype=torch.int32),
                united_slots=meta(num_experts, **long),
                mechanism=mechanism,
                ranking=ranking,
                renormalize=config.norm_topk_prob,
                replaced=meta(rows, dtype=torch.int32),
                shared=SharedSlots(x, meta(1, hidden), slots, shared) if shared and rows <= FOLDED_ROWS else None,
            )
    int32 = {"dtype": torch.int32}
    for rows, splits in ((1, 1), (1, 8), (64, 1), (64, 8)):
        q = meta(rows, heads + 2 * groups, dim)[:, :heads]
        tables = (meta(rows, TABLE, **int32), meta(rows, **int32))
        attend_in_splits(q, cache, cache, *tables, 0.1, None, splits, 256)
    with mock.patch.object(attention_prefill, "_tiles", lambda *_: meta(len(q), 4, **int32)):
        for window in (None, 4096):
            gpu.prefill_attention(q, cache, cache, meta(1, TABLE, **int32), [len(q)], [len(q)], 0.1, window)


def main(shape: str, architecture: str) -> None:
    with CompileOnly(int(architecture)) as compiled:
        launch_all(shape, int(architecture))
    print(json.dumps([asdict(kernel) for kernel in compiled]))


if __name__ == "__main__":
    main(*sys.argv[1:])
