"""From a schedule to the tensors of one forward pass."""

from __future__ import annotations

from array import array
from operator import getitem

import numpy as np
import torch

from backend.engine.request import NEVER
from backend.engine.scheduler import Schedule
from backend.kernels.transfer import to_device
from backend.models.forward_batch import ForwardBatch


def build_batch(
    schedule: Schedule, block_size: int, device: torch.device, previous: torch.Tensor | None = None
) -> ForwardBatch:
    """Lay the scheduled tokens end to end; see ForwardBatch for shapes.

    Logits are wanted for the last token of each sequence whose known tokens are all computed by this step. A schedule made
    ahead takes its input from `previous` [R] int64, the tokens that the step before it chose, on the device.
    """
    sequences, num_tokens, ahead = schedule.sequences, schedule.num_tokens, schedule.previous_rows
    num_sequences, num_decodes = len(sequences), schedule.num_decodes
    counts = _integers(num_tokens)
    tokens = [sequence.tokens for sequence in sequences]
    computed = [sequence.num_computed for sequence in sequences]
    starts, known = _integers(computed), _integers(list(map(len, tokens)))
    query_start = np.zeros(num_sequences + 1, np.int32)
    np.cumsum(counts, out=query_start[1:])
    context_lens = starts + counts

    if ahead is None:
        token_ids = list(map(getitem, tokens[:num_decodes], computed))
        for i in range(num_decodes, num_sequences):
            token_ids += tokens[i][computed[i] : computed[i] + num_tokens[i]]
    else:
        token_ids, known = ahead, known + 1  # where they will be

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

    ids, *tensors = to_device(
        [
            _integers(token_ids),
            positions,
            kv_slots,
            query_start,
            context_lens.astype(np.int32),
            block_tables,
            logit_rows.astype(np.int64),
            classes[rows],
        ],
        device,
    )
    if ahead is not None:
        assert previous is not None
        # Of a row that went wrong there is no token (-1), and nobody will look at what follows it.
        ids = previous.index_select(0, ids).clamp_(min=0)
    return ForwardBatch(
        ids,
        *tensors,
        num_decodes=num_decodes,
        query_lens=num_tokens,
        context_lens_host=context_lens.tolist(),
    )


def _integers(values: list[int]) -> np.ndarray:
    """[n] int64, writable; twice as fast as np.array."""
    return np.frombuffer(array("q", values), np.int64)
