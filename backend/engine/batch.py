"""From a schedule to the tensors of one forward pass."""

from __future__ import annotations

from array import array
from operator import getitem

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
    num_sequences, num_decodes = len(sequences), schedule.num_decodes
    counts = _integers(num_tokens)
    tokens = [sequence.tokens for sequence in sequences]
    computed = [sequence.num_computed for sequence in sequences]
    starts, known = _integers(computed), _integers(list(map(len, tokens)))
    query_start = np.zeros(num_sequences + 1, np.int32)
    np.cumsum(counts, out=query_start[1:])
    context_lens = starts + counts

    token_ids = list(map(getitem, tokens[:num_decodes], computed))
    for i in range(num_decodes, num_sequences):
        token_ids += tokens[i][computed[i] : computed[i] + num_tokens[i]]

    # All tables end to end, then each to the beginning of its row.
    tables = [sequence.blocks for sequence in sequences]
    lengths = _integers(list(map(len, tables)))
    block_tables = np.zeros((num_sequences, int(lengths.max())), np.int32)
    block_tables[np.arange(block_tables.shape[1]) < lengths[:, None]] = np.frombuffer(b"".join(tables), np.int32)

    if num_decodes == num_sequences:
        rows, positions = np.arange(num_sequences), starts
    else:
        rows = np.repeat(np.arange(num_sequences), counts)  # [T] the sequence of each token
        positions = np.arange(len(rows)) + (starts - query_start[:-1])[rows]
    kv_slots = block_tables[rows, positions // block_size] * block_size + positions % block_size

    # Sequence.token_class of all at once.
    prompts = _integers([sequence.num_prompt for sequence in sequences])
    classes = ((counts == 1) & (starts >= prompts)).astype(np.int8)
    never = [sequence.never_browned for sequence in sequences]
    if any(never):
        classes[never] += NEVER
    logit_rows = query_start[1:][context_lens == known] - 1

    def on_device(values: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(values)  # as_tensor costs ten times as much
        return tensor if device.type == "cpu" else tensor.to(device, non_blocking=True)

    return ForwardBatch(
        token_ids=on_device(_integers(token_ids)),
        positions=on_device(positions),
        kv_slots=on_device(kv_slots),
        query_start=on_device(query_start),
        context_lens=on_device(context_lens.astype(np.int32)),
        block_tables=on_device(block_tables),
        logit_rows=on_device(logit_rows.astype(np.int64)),
        token_class=on_device(classes[rows]),
        num_decodes=num_decodes,
        query_lens=num_tokens,
        context_lens_host=context_lens.tolist(),
    )


def _integers(values: list[int]) -> np.ndarray:
    """[n] int64, writable; twice as fast as np.array."""
    return np.frombuffer(array("q", values), np.int64)
