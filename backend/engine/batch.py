"""From schedules to the tensors of forward passes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as SequenceOf
from itertools import count, repeat

import numpy as np
import torch

from backend.brownout.settings import NEVER
from backend.engine.request import Sequence
from backend.engine.scheduler import Schedule
from backend.kernels.transfer import to_device
from backend.models.forward_batch import ForwardBatch


class BatchBuilder:
    """Makes the batches of successive steps.

    What does not change while a sequence runs is kept from one batch to the next, a row for each of the last batch's
    sequences: above all its block table, to which only new blocks are added. A sequence that is admitted, also one that
    comes back after a preemption, begins an empty row.
    """

    def __init__(self, block_size: int, device: torch.device) -> None:
        self._block_size, self._device = block_size, device
        self._sequences: list[Sequence] = []
        #: [S, places] their blocks; the rest of a row is 0. Both arrays have an empty row before there are sequences.
        self._tables = np.zeros((1, 0), np.int32)
        #: [3, S] of each sequence the blocks that are filled in, its prompt tokens, and what is added to its tokens' class.
        self._facts = np.zeros((3, 1), np.int64)

    def build(self, schedule: Schedule, previous: torch.Tensor | None = None) -> ForwardBatch:
        """Lay the scheduled tokens end to end; see ForwardBatch for shapes.

        A schedule made ahead takes its first sequences' input from `previous` [R] int64, the tokens that the step before it
        chose, on the device; None if that chose none.
        """
        sequences, num_decodes = schedule.sequences, schedule.num_decodes
        num_sequences = len(sequences)
        computed = [sequence.num_computed for sequence in sequences]
        starts, counts = _integers(computed), _integers(schedule.num_tokens)
        context_lens = starts + counts
        self._follow(schedule)
        self._add_blocks(context_lens)

        query_start = np.zeros(num_sequences + 1, np.int64)
        counts.cumsum(out=query_start[1:])
        filled, prompts, never = self._facts
        positions, rows = starts, np.arange(num_sequences)
        classes = ((counts == 1) & (starts >= prompts)) + never  # Sequence.token_class of all at once
        if num_decodes < num_sequences:
            rows = rows.repeat(counts)  # [T] the sequence of each token
            positions = np.arange(len(rows)) + (starts - query_start[:-1])[rows]
            classes = classes[rows]
        places, offsets = np.divmod(positions, self._block_size)
        logit_rows = query_start[1:] - 1

        ids, *tensors = to_device(
            [
                _integers(_next_tokens(schedule, computed)),
                positions,
                self._tables[rows, places] * self._block_size + offsets,
                query_start.astype(np.int32),
                context_lens.astype(np.int32),
                self._tables[:, : filled.max()].copy(),  # what a batch holds does not change afterwards
                np.delete(logit_rows, schedule.partial) if schedule.partial else logit_rows,
                classes.astype(np.int8),
            ],
            self._device,
        )
        if schedule.previous_rows:
            assert previous is not None
            unknown = ids[: len(schedule.previous_rows)]
            # Of a row that went wrong there is no token (-1), and nobody will look at what follows it.
            unknown.copy_(previous.index_select(0, unknown).clamp_(min=0))
        return ForwardBatch(
            ids,
            *tensors,
            num_decodes=num_decodes,
            query_lens=schedule.num_tokens,
            context_lens_host=context_lens.tolist(),
        )

    def _follow(self, schedule: Schedule) -> None:
        """Bring the rows into the order of the scheduled sequences: those of others go, new ones are empty."""
        sequences, admitted = schedule.sequences, schedule.admitted
        if sequences == self._sequences and not admitted:
            return
        row_of = dict(zip(self._sequences, count()))
        for sequence in admitted:
            row_of.pop(sequence, None)
        rows = _integers(list(map(row_of.get, sequences, repeat(-1))))
        facts, tables = self._facts.take(rows, 1), self._tables.take(rows, 0)
        for row in (rows < 0).nonzero()[0].tolist():
            facts[:, row] = 0, sequences[row].num_prompt, NEVER * sequences[row].never_browned
            tables[row] = 0
        needed = facts[0].max()
        if 4 * needed < tables.shape[1]:  # those that needed so many places have gone
            tables = tables[:, :needed].copy()
        self._sequences, self._facts, self._tables = sequences, facts, tables

    def _add_blocks(self, context_lens: np.ndarray) -> None:
        """Fill in the blocks of rows that lack some for so many tokens [S]."""
        lacking = (self._facts[0] * self._block_size < context_lens).nonzero()[0]
        if not len(lacking):
            return
        rows, filled = lacking.tolist(), self._facts[0, lacking].tolist()
        lengths = [len(self._sequences[row].blocks) for row in rows]
        places = self._tables.shape[1]
        if max(lengths) > places:
            # More than needed, so that a sequence that grows does not lead here with every block.
            wider = np.zeros((len(self._tables), max(lengths) * 5 // 4), np.int32)
            wider[:, :places] = self._tables
            self._tables, places = wider, wider.shape[1]
        flat = memoryview(self._tables.reshape(-1))  # takes a few numbers far sooner than an array does
        for row, filled_in, length in zip(rows, filled, lengths, strict=True):
            flat[row * places + filled_in : row * places + length] = self._sequences[row].blocks[filled_in:]
        self._facts[0, lacking] = lengths


def build_batch(schedule: Schedule, block_size: int, device: torch.device) -> ForwardBatch:
    """A single batch; for successive ones see BatchBuilder."""
    return BatchBuilder(block_size, device).build(schedule)


def _next_tokens(schedule: Schedule, computed: list[int]) -> array:
    """The tokens to be computed, sequence by sequence, of which so many are `computed` already.

    For tokens that are not known yet, their rows in the step before.
    """
    sequences, num_decodes = schedule.sequences, schedule.num_decodes
    token_ids = array("q", schedule.previous_rows or ())
    known = slice(len(token_ids), num_decodes)
    token_ids.extend([sequence.tokens[n] for sequence, n in zip(sequences[known], computed[known], strict=True)])
    for i in range(num_decodes, len(sequences)):
        token_ids += sequences[i].tokens[computed[i] : computed[i] + schedule.num_tokens[i]]
    return token_ids


def _integers(values: SequenceOf[int]) -> np.ndarray:
    """[n] int64, writable; twice as fast as np.array."""
    return np.frombuffer(array("q", values), np.int64)
