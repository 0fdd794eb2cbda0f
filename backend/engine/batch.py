"""From a schedule to the tensors of one forward pass."""

from __future__ import annotations

from array import array

import numpy as np
import torch

from backend.engine.request import NEVER
from backend.engine.scheduler import Schedule
from backend.models.forward_batch import ForwardBatch


def build_batch(schedule: Schedule, block_size: int, device: torch.device) -> ForwardBatch:
    """Lay the scheduled tokens end to end; see ForwardBatch for shapes.

    Logits are wanted for the last token of each sequence whose known tokens are all computed by this step.
    """
    sequences, num_tokens = schedule.sequences, schedule.num_tokens
    num_decodes = schedule.num_decodes
    counts = np.array(num_tokens)
    starts = np.array([sequence.num_computed for sequence in sequences])
    query_start = np.zeros(len(sequences) + 1, np.int32)
    np.cumsum(counts, out=query_start[1:])
    context_lens = starts + counts

    token_ids = [sequence.tokens[sequence.num_computed] for sequence in sequences[:num_decodes]]
    for sequence, count in zip(sequences[num_decodes:], num_tokens[num_decodes:], strict=True):
        token_ids += sequence.tokens[sequence.num_computed : sequence.num_computed + count]

    # All tables end to end, then each to the beginning of its row.
    lengths = np.array([len(sequence.blocks) for sequence in sequences])
    blocks = array("i")
    for sequence in sequences:
        blocks.extend(sequence.blocks)
    block_tables = np.zeros((len(sequences), int(lengths.max())), np.int32)
    block_tables[np.arange(block_tables.shape[1]) < lengths[:, None]] = blocks

    rows = np.repeat(np.arange(len(sequences)), counts)  # [T] the sequence of each token
    positions = np.arange(len(rows)) + (starts - query_start[:-1])[rows]
    kv_slots = block_tables[rows, positions // block_size] * block_size + positions % block_size

    # Sequence.token_class of all at once.
    prompts = np.array([sequence.num_prompt for sequence in sequences])
    classes = ((counts == 1) & (starts >= prompts)).astype(np.int8)
    never = [i for i, sequence in enumerate(sequences) if sequence.never_browned]
    if never:
        classes[never] += NEVER
    known = np.array([len(sequence.tokens) for sequence in sequences])
    logit_rows = query_start[1:][context_lens == known] - 1

    def on_device(values: object, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(values, dtype=dtype).to(device, non_blocking=True)

    return ForwardBatch(
        token_ids=on_device(np.array(token_ids), torch.int64),
        positions=on_device(positions, torch.int64),
        kv_slots=on_device(kv_slots, torch.int64),
        query_start=on_device(query_start, torch.int32),
        context_lens=on_device(context_lens, torch.int32),
        block_tables=on_device(block_tables, torch.int32),
        logit_rows=on_device(logit_rows, torch.int64),
        token_class=on_device(classes[rows], torch.int8),
        num_decodes=num_decodes,
        query_lens=num_tokens,
        context_lens_host=context_lens.tolist(),
    )
