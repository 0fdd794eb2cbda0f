"""From a schedule to the tensors of one forward pass."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch

from backend.engine.scheduler import Schedule
from backend.models.forward_batch import ForwardBatch


def build_batch(schedule: Schedule, block_size: int, device: torch.device) -> ForwardBatch:
    """Lay the scheduled tokens end to end; see ForwardBatch for shapes.

    Logits are wanted for the last token of each sequence whose known tokens are all computed by this step.
    """
    num_tokens = schedule.num_tokens
    total = sum(num_tokens)
    token_ids: list[int] = []
    positions = np.empty(total, np.int64)
    token_class = np.empty(total, np.int8)
    context_lens: list[int] = []
    logit_rows: list[int] = []
    block_tables = np.zeros((len(num_tokens), max(len(s.blocks) for s in schedule.sequences)), np.int32)
    query_start = [0, *accumulate(num_tokens)]
    kv_slots = np.empty(total, np.int64)
    for i, (sequence, count) in enumerate(zip(schedule.sequences, num_tokens, strict=True)):
        start, row = sequence.num_computed, query_start[i]
        token_ids.extend(sequence.tokens[start : start + count])
        context_lens.append(start + count)
        token_class[row : row + count] = sequence.token_class(count)
        blocks = np.frombuffer(sequence.blocks, np.int32)
        block_tables[i, : len(blocks)] = blocks
        if count == 1:
            positions[row] = start
            kv_slots[row] = int(blocks[start // block_size]) * block_size + start % block_size
        else:
            span = np.arange(start, start + count)
            positions[row : row + count] = span
            kv_slots[row : row + count] = blocks[span // block_size].astype(np.int64) * block_size + span % block_size
        if start + count == len(sequence.tokens):
            logit_rows.append(row + count - 1)

    def on_device(values: object, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(values, dtype=dtype).to(device, non_blocking=True)

    return ForwardBatch(
        token_ids=on_device(token_ids, torch.int64),
        positions=on_device(positions, torch.int64),
        kv_slots=on_device(kv_slots, torch.int64),
        query_start=on_device(query_start, torch.int32),
        context_lens=on_device(context_lens, torch.int32),
        block_tables=on_device(block_tables, torch.int32),
        logit_rows=on_device(logit_rows, torch.int64),
        token_class=on_device(token_class, torch.int8),
        num_decodes=schedule.num_decodes,
        query_lens=num_tokens,
        context_lens_host=context_lens,
    )
