"""Decode steps as CUDA graphs: one launch for a step instead of hundreds.

A graph replays the same kernels on the same addresses. So there is one for each bucket of rows, all read their inputs from
the same buffers, and a step with fewer rows than its bucket is padded: padding rows are a token of their own in a spare KV
block, and the device scalar `num_tokens` keeps them out of brownout and experts. Thresholds and tables are read from tensors
that change in place, so a change of settings needs no new graph; what changes the kernels themselves is a `variant`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from backend.models.forward_batch import ForwardBatch

#: Rows of the small buckets; then come multiples of the last step.
_SMALL = (1, 2, 4, 8, 16)
_STEP = 8


def buckets_for(max_rows: int) -> list[int]:
    """Rows that graphs are captured for: 1, 2, 4, 8, 16, 24, … up to and including `max_rows`."""
    return sorted({*(b for b in _SMALL if b < max_rows), *range(_SMALL[-1] + _STEP, max_rows, _STEP), max_rows})


class Graph(Protocol):
    """A captured function."""

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        """Returns the function's result, which every replay overwrites; its values are undefined until the first one."""

    def replay(self) -> None:
        """Run what was captured again."""


class CudaGraph:
    """torch.cuda.CUDAGraph whose memory comes from `pool` and that is captured on `stream`."""

    def __init__(self, pool: tuple[int, int], stream: torch.cuda.Stream) -> None:
        self._graph, self._pool, self._stream = torch.cuda.CUDAGraph(), pool, stream

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        # A run beforehand compiles kernels and lets libraries take their workspaces (they have one for each stream), which a
        # capture must not do.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            function()
        torch.cuda.current_stream().wait_stream(self._stream)
        # Other threads of the process may use the device meanwhile.
        with torch.cuda.graph(self._graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            return function()

    def replay(self) -> None:
        self._graph.replay()


def cuda_graphs() -> Callable[[], Graph]:
    """Makes graphs that share one memory pool: only one of them is replayed at a time.

    The pool goes with the last graph, so each set of graphs needs one of its own.
    """
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    return lambda: CudaGraph(pool, stream)


class DecodeGraphs:
    """Captures and replays decode steps of up to `max_rows` sequences."""

    def __init__(
        self,
        forward: Callable[[ForwardBatch, Tensor], Tensor],
        *,
        vocab_size: int,
        max_rows: int,
        max_blocks: int,
        block_size: int,
        spare_block: int,
        device: torch.device,
        record: Callable[[], list[Tensor]],
        set_record: Callable[[Sequence[Tensor]], None],
        new_graph: Callable[[], Graph],
    ) -> None:
        """
        Args:
            forward: One step; writes logits to the given [R, V] float32 and returns them.
            max_blocks: Blocks of the longest sequence.
            spare_block: A block of the KV cache that no sequence ever has.
            record: Tensors with one row per token that `forward` leaves behind for telemetry; `set_record` puts them back.
        """
        self._forward, self._record, self._set_record, self._new_graph = forward, record, set_record, new_graph
        self.buckets = buckets_for(max_rows)
        self._padding_slot, self._spare_block = spare_block * block_size, spare_block
        self._captured: dict[tuple[int, Hashable], tuple[Graph, Tensor, list[Tensor]]] = {}

        def buffer(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._token_ids = buffer(torch.int64, max_rows)
        self._positions = buffer(torch.int64, max_rows)
        self._kv_slots = buffer(torch.int64, max_rows)
        self._context_lens = buffer(torch.int32, max_rows)
        self._block_tables = buffer(torch.int32, max_rows, max_blocks)
        self._token_class = buffer(torch.int8, max_rows)
        self._num_tokens = buffer(torch.int32)
        #: All graphs write their logits here: each of its own would take gigabytes with a large vocabulary.
        self._logits = buffer(torch.float32, max_rows, vocab_size)
        self._rows = torch.arange(max_rows + 1, device=device)
        self._starts = self._rows.int()

    def accepts(self, batch: ForwardBatch) -> bool:
        """Whether every sequence of the batch has one token to compute, and there are not too many."""
        return 0 < batch.num_decodes == len(batch.query_lens) <= self.buckets[-1]

    def run(self, batch: ForwardBatch, variant: Hashable = None) -> Tensor:
        """Logits [R, V] of a batch that is accepted; they hold until the next call.

        `variant` stands for everything beside tensors that decides which kernels run.
        """
        rows = len(batch.query_lens)
        bucket = next(b for b in self.buckets if b >= rows)
        self._fill(batch, rows, bucket)
        graph, logits, record = self._graph(bucket, variant)
        graph.replay()
        self._set_record([tensor[:rows] for tensor in record])
        if len(batch.logit_rows) == rows:
            return logits[:rows]
        return logits.index_select(0, batch.logit_rows)

    def capture_all(self, variant: Hashable = None) -> None:
        """Capture every bucket, the largest first: the smaller ones then fit into its memory."""
        for bucket in reversed(self.buckets):
            self._pad(0, bucket)
            self._graph(bucket, variant)

    def _graph(self, bucket: int, variant: Hashable) -> tuple[Graph, Tensor, list[Tensor]]:
        key = (bucket, variant)
        if key not in self._captured:
            graph, batch = self._new_graph(), self._batch(bucket)
            logits = graph.capture(lambda: self._forward(batch, self._logits[:bucket]))
            self._captured[key] = graph, logits, self._record()
        return self._captured[key]

    def _batch(self, rows: int) -> ForwardBatch:
        """The buffers' first rows as a batch."""
        return ForwardBatch(
            token_ids=self._token_ids[:rows],
            positions=self._positions[:rows],
            kv_slots=self._kv_slots[:rows],
            query_start=self._starts[: rows + 1],
            context_lens=self._context_lens[:rows],
            block_tables=self._block_tables[:rows],
            logit_rows=self._rows[:rows],
            token_class=self._token_class[:rows],
            num_decodes=rows,
            query_lens=[1] * rows,
            context_lens_host=[1] * rows,
            num_tokens=self._num_tokens,
        )

    def _fill(self, batch: ForwardBatch, rows: int, bucket: int) -> None:
        for buffer, values in (
            (self._token_ids, batch.token_ids),
            (self._positions, batch.positions),
            (self._kv_slots, batch.kv_slots),
            (self._context_lens, batch.context_lens),
            (self._token_class, batch.token_class),
        ):
            buffer[:rows].copy_(values)
        # Places of the table beyond a sequence's blocks are never read.
        self._block_tables[:rows, : batch.block_tables.shape[1]].copy_(batch.block_tables)
        self._pad(rows, bucket)

    def _pad(self, rows: int, bucket: int) -> None:
        """Make rows `rows` to `bucket` padding."""
        self._num_tokens.fill_(rows)
        if rows < bucket:
            self._token_ids[rows:bucket].zero_()
            self._positions[rows:bucket].zero_()
            self._kv_slots[rows:bucket].fill_(self._padding_slot)
            self._context_lens[rows:bucket].fill_(1)
            self._token_class[rows:bucket].zero_()
            self._block_tables[rows:bucket, 0].fill_(self._spare_block)
