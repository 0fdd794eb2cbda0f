"""From a schedule to the tensors of one forward pass."""

from __future__ import annotations

from array import array

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
    num_decodes = schedule.num_decodes
    counts = np.array(num_tokens)
    starts = np.array([sequence.num_computed for sequence in sequences])
    query_start = np.zeros(len(sequences) + 1, np.int32)
    np.cumsum(counts, out=query_start[1:])
    context_lens = starts + counts

    if ahead is not None:
        token_ids = ahead  # where they will be
    else:
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
    known = np.array([len(sequence.tokens) + (ahead is not None) for sequence in sequences])
    logit_rows = query_start[1:][context_lens == known] - 1

    def as_type(values: object, dtype: type[np.generic]) -> np.ndarray:
        return np.ascontiguousarray(values, dtype)

    ids, *tensors = to_device(
        [
            as_type(token_ids, np.int64),
            as_type(positions, np.int64),
            as_type(kv_slots, np.int64),
            query_start,
            as_type(context_lens, np.int32),
            block_tables,
            as_type(logit_rows, np.int64),
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
