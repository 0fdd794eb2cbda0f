"""From schedules to the tensors of forward passes."""

from __future__ import annotations

from array import array
from operator import is_

import numpy as np
import torch

from backend.engine.request import NEVER, Sequence
from backend.engine.scheduler import Schedule
from backend.kernels.transfer import to_device
from backend.models.forward_batch import ForwardBatch


class BatchBuilder:
    """Makes the batches of successive steps.

    What does not change while a sequence runs is kept from one batch to the next, a row for each of the last batch's
    sequences: above all its block table, to which only new blocks are added. A row belongs to a `Sequence.blocks`, which
    only grows; a sequence that comes back after a preemption has another one.
    """

    def __init__(self, block_size: int, device: torch.device) -> None:
        self._block_size, self._device = block_size, device
        self._blocks: list[array] = []
        #: [S, places] the same blocks; the rest of a row is 0. Both arrays have an empty row before there are sequences.
        self._tables = np.zeros((1, 0), np.int32)
        #: [S, 3] of each sequence the blocks that are filled in, its prompt tokens, and what is added to its tokens' class.
        self._facts = np.zeros((1, 3), np.int64)

    def build(self, schedule: Schedule, previous: torch.Tensor | None = None) -> ForwardBatch:
        """Lay the scheduled tokens end to end; see ForwardBatch for shapes.

        A schedule made ahead takes its input from `previous` [R] int64, the tokens that the step before it chose, on the
        device.
        """
        sequences, num_decodes, ahead = schedule.sequences, schedule.num_decodes, schedule.previous_rows
        num_sequences = len(sequences)
        computed = [sequence.num_computed for sequence in sequences]
        only_decodes = num_decodes == num_sequences
        starts, counts = _integers(computed), 1 if only_decodes else _integers(schedule.num_tokens)
        context_lens = starts + counts
        self._follow(sequences)
        self._add_blocks(context_lens)

        if only_decodes:
            query_start = np.arange(num_sequences + 1, dtype=np.int32)
            rows, positions = np.arange(num_sequences), starts
        else:
            query_start = np.zeros(num_sequences + 1, np.int32)
            np.cumsum(counts, out=query_start[1:])
            rows = np.repeat(np.arange(num_sequences), counts)  # [T] the sequence of each token
            positions = np.arange(len(rows)) + (starts - query_start[:-1])[rows]
        block_size = self._block_size
        kv_slots = self._tables[rows, positions // block_size] * block_size + positions % block_size
        _, prompts, never = self._facts.T
        classes = ((counts == 1) & (starts >= prompts)) + never  # Sequence.token_class of all at once
        logit_rows = query_start[1:].astype(np.int64) - 1

        ids, *tensors = to_device(
            [
                _integers(_next_tokens(schedule, computed) if ahead is None else ahead),
                positions,
                kv_slots,
                query_start,
                context_lens.astype(np.int32),
                self._tables[:, : self._facts[:, 0].max()].copy(),  # what a batch holds does not change afterwards
                np.delete(logit_rows, schedule.partial) if schedule.partial else logit_rows,
                classes[rows].astype(np.int8),
            ],
            self._device,
        )
        if ahead is not None:
            assert previous is not None
            # Of a row that went wrong there is no token (-1), and nobody will look at what follows it.
            ids = previous.index_select(0, ids).clamp_(min=0)
        return ForwardBatch(
            ids,
            *tensors,
            num_decodes=num_decodes,
            query_lens=schedule.num_tokens,
            context_lens_host=context_lens.tolist(),
        )

    def _follow(self, sequences: list[Sequence]) -> None:
        """Bring the rows into the order of these sequences: those of others go, new ones are empty."""
        blocks = [sequence.blocks for sequence in sequences]
        if len(blocks) == len(self._blocks) and all(map(is_, blocks, self._blocks)):
            return
        row_of = {id(known): row for row, known in enumerate(self._blocks)}
        rows = _integers([row_of.get(id(wanted), -1) for wanted in blocks])
        facts, tables = self._facts[rows], self._tables[rows]
        for row in np.flatnonzero(rows < 0).tolist():
            facts[row] = 0, sequences[row].num_prompt, NEVER * sequences[row].never_browned
            tables[row] = 0
        self._blocks, self._facts, self._tables = blocks, facts, tables

    def _add_blocks(self, context_lens: np.ndarray) -> None:
        """Fill in the blocks of rows that lack some for so many tokens [S]."""
        lacking = np.flatnonzero(self._facts[:, 0] * self._block_size < context_lens).tolist()
        if not lacking:
            return
        lengths = [len(self._blocks[row]) for row in lacking]
        self._make_places(max(lengths))
        places = self._tables.shape[1]
        flat = memoryview(self._tables.reshape(-1))  # takes a few numbers far sooner than an array does
        for row, filled, length in zip(lacking, self._facts[lacking, 0].tolist(), lengths, strict=True):
            flat[row * places + filled : row * places + length] = self._blocks[row][filled:]
        self._facts[lacking, 0] = lengths

    def _make_places(self, needed: int) -> None:
        """Widen the tables to so many places, or narrow them if they are far wider than any row needs."""
        places = self._tables.shape[1]
        needed = max(needed, int(self._facts[:, 0].max()))
        if needed > places or 4 * needed < places:
            # More than needed, so that a sequence that grows does not lead here with every block.
            tables = np.zeros((len(self._tables), needed + needed // 4), np.int32)
            kept = min(places, needed)
            tables[:, :kept] = self._tables[:, :kept]
            self._tables = tables


def build_batch(schedule: Schedule, block_size: int, device: torch.device) -> ForwardBatch:
    """A single batch; for successive ones see BatchBuilder."""
    return BatchBuilder(block_size, device).build(schedule)


def _next_tokens(schedule: Schedule, computed: list[int]) -> list[int]:
    """The tokens to be computed, of which `computed` are already, sequence by sequence."""
    sequences, num_decodes = schedule.sequences, schedule.num_decodes
    token_ids = [sequence.tokens[n] for sequence, n in zip(sequences[:num_decodes], computed)]  # noqa: B905
    for i in range(num_decodes, len(sequences)):
        token_ids += sequences[i].tokens[computed[i] : computed[i] + schedule.num_tokens[i]]
    return token_ids


def _integers(values: list[int]) -> np.ndarray:
    """[n] int64, writable; twice as fast as np.array."""
    return np.frombuffer(array("q", values), np.int64)
