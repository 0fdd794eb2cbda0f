"""Steps as CUDA graphs: one launch for a step instead of hundreds.

A graph replays the same kernels on the same addresses. So there is one for each bucket of rows, all read their inputs from
the same buffers, and a step with fewer rows than its bucket is padded: padding rows are a token of their own in a spare KV
block, and the device scalar `num_tokens` keeps them out of brownout and experts. Thresholds and tables are read from tensors
that change in place, so a change of settings needs no new graph; what changes the kernels themselves is a `variant`.

There are graphs for steps in which every sequence has one token to compute, and others for steps of limited size with prompts
among them (mixed steps): launching their hundreds of kernels takes the host some milliseconds, during which a GPU may have little
to do. They find which rows belong to which sequence in a table of tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from backend.kernels.query_tiles import num_tiles, query_tiles
from backend.kernels.transfer import to_device
from backend.models.forward_batch import ForwardBatch

#: Rows of the small buckets; then come multiples of the last step.
_SMALL = (1, 2, 4, 8, 16)
_STEP = 8
#: Tokens of mixed steps. Larger ones should keep a GPU busy while they are launched (an estimate, not measured).
_MIXED = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
#: A mixed step may have so many prompts, and one more for so many tokens, each with a tile of queries that is not full.
_MIXED_PROMPTS, _PROMPT_TOKENS = 16, 32
#: Tokens that a decoding sequence may have in a mixed step: its attention is not split over processors as far as it is
#: where few sequences decode alone.
_MIXED_CONTEXT = 8192


def buckets_for(max_rows: int) -> list[int]:
    """Rows that graphs of decode steps are captured for: 1, 2, 4, 8, 16, 24, … up to and including `max_rows`."""
    return sorted({*(b for b in _SMALL if b < max_rows), *range(_SMALL[-1] + _STEP, max_rows, _STEP), max_rows})


def mixed_buckets_for(max_tokens: int) -> list[int]:
    """Tokens that graphs of mixed steps are captured for where steps have at most `max_tokens`."""
    return [*(b for b in _MIXED if b < max_tokens), *([max_tokens] if max_tokens <= _MIXED[-1] else [])]


@dataclass(frozen=True)
class Bucket:
    """The size of a captured step: rows of tokens, rows of sequences, and, in mixed steps, tiles of queries (else 0)."""

    tokens: int
    sequences: int
    tiles: int = 0


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


class StepGraphs:
    """Captures and replays steps of up to `max_rows` sequences with one token each, and mixed ones of up to `max_tokens`."""

    def __init__(
        self,
        forward: Callable[[ForwardBatch, Tensor], Tensor],
        *,
        vocab_size: int,
        max_rows: int,
        max_tokens: int,
        tile_queries: int | None,
        max_blocks: int,
        block_size: int,
        spare_block: int,
        device: torch.device,
        record: Callable[[], list[Tensor]],
        set_record: Callable[[Sequence[Tensor], int], None],
        new_graph: Callable[[], Graph],
    ) -> None:
        """
        Args:
            forward: One step; writes logits to the given [R, V] float32 and returns them.
            tile_queries: Queries of a full tile; None: there are no graphs of mixed steps.
            max_blocks: Blocks of the longest sequence.
            spare_block: A block of the KV cache that no sequence ever has.
            record: Tensors with one row per token that `forward` leaves behind for telemetry; `set_record` puts them back, with
                the number of rows that count.
        """
        self._forward, self._record, self._set_record, self._new_graph = forward, record, set_record, new_graph
        self._device, self._tile_queries = device, tile_queries or 1
        self.decode_buckets = [Bucket(rows, rows) for rows in buckets_for(max_rows)]
        self.mixed_buckets: list[Bucket] = []
        for tokens in mixed_buckets_for(max_tokens) if tile_queries is not None else ():
            tiles = tokens // self._tile_queries + tokens // _PROMPT_TOKENS + _MIXED_PROMPTS
            self.mixed_buckets.append(Bucket(tokens, min(tokens, max_rows), tiles))
        self._padding_slot, self._spare_block = spare_block * block_size, spare_block
        self._captured: dict[tuple[Bucket, Hashable], tuple[Graph, Tensor, list[Tensor]]] = {}

        def buffer(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        tokens = max(bucket.tokens for bucket in self.buckets)
        self._token_ids = buffer(torch.int64, tokens)
        self._positions = buffer(torch.int64, tokens)
        self._kv_slots = buffer(torch.int64, tokens)
        self._token_class = buffer(torch.int8, tokens)
        self._context_lens = buffer(torch.int32, max_rows)
        self._block_tables = buffer(torch.int32, max_rows, max_blocks)
        self._num_tokens = buffer(torch.int32)
        self._tiles = buffer(torch.int32, max(bucket.tiles for bucket in self.buckets), 4)
        #: Of mixed steps; in others each row has logits.
        self._logit_rows = buffer(torch.int64, max_rows)
        #: All graphs write their logits here: each of its own would take gigabytes with a large vocabulary.
        self._logits = buffer(torch.float32, max_rows, vocab_size)
        self._rows = torch.arange(max_rows + 1, device=device)
        self._starts = self._rows.int()

    @property
    def buckets(self) -> list[Bucket]:
        """All sizes that are captured."""
        return [*self.decode_buckets, *self.mixed_buckets]

    def bucket_of(self, batch: ForwardBatch) -> Bucket | None:
        """The smallest captured step that the batch fits into; None: no graph is for such batches."""
        num_sequences, n = len(batch.query_lens), batch.num_decodes
        if 0 < n == num_sequences:
            return next((b for b in self.decode_buckets if b.tokens >= n), None)
        if max(batch.context_lens_host[:n], default=0) > _MIXED_CONTEXT:
            return None
        num_tokens, tiles = len(batch.token_ids), num_tiles(batch.query_lens[n:], self._tile_queries)
        fitting = (b for b in self.mixed_buckets if b.tokens >= num_tokens and b.sequences >= num_sequences)
        bucket = next(fitting, None)
        return bucket if bucket is not None and bucket.tiles >= tiles else None

    def run(self, batch: ForwardBatch, bucket: Bucket, variant: Hashable = None) -> Tensor:
        """Logits [R, V] of a batch with its bucket; they hold until the next call.

        `variant` stands for everything beside tensors that decides which kernels run.
        """
        num_tokens, num_logits = len(batch.token_ids), len(batch.logit_rows)
        self._fill(batch, bucket)
        graph, logits, record = self._graph(bucket, variant)
        graph.replay()
        self._set_record(record, num_tokens)
        if bucket.tiles or num_logits == num_tokens:
            return logits[:num_logits]
        return logits.index_select(0, batch.logit_rows)

    def capture_all(self, variant: Hashable = None) -> None:
        """Capture every bucket, the largest first: the smaller ones then fit into its memory."""
        for bucket in sorted(self.buckets, key=lambda bucket: -bucket.tokens):
            self._pad(bucket, 0, 0)
            self._logit_rows.zero_()
            self._tiles.zero_()
            self._graph(bucket, variant)

    def _graph(self, bucket: Bucket, variant: Hashable) -> tuple[Graph, Tensor, list[Tensor]]:
        key = (bucket, variant)
        if key not in self._captured:
            graph, batch = self._new_graph(), self._batch(bucket)
            logits = graph.capture(lambda: self._forward(batch, self._logits[: bucket.sequences]))
            self._captured[key] = graph, logits, self._record()
        return self._captured[key]

    def _batch(self, bucket: Bucket) -> ForwardBatch:
        """The buffers' first rows as a batch."""
        rows, sequences = bucket.tokens, bucket.sequences
        return ForwardBatch(
            token_ids=self._token_ids[:rows],
            positions=self._positions[:rows],
            kv_slots=self._kv_slots[:rows],
            query_start=self._starts[: sequences + 1],
            context_lens=self._context_lens[:sequences],
            block_tables=self._block_tables[:sequences],
            logit_rows=(self._logit_rows if bucket.tiles else self._rows)[:sequences],
            token_class=self._token_class[:rows],
            num_decodes=sequences,
            query_lens=[1] * sequences,
            context_lens_host=[1] * sequences,
            num_tokens=self._num_tokens,
            tiles=self._tiles[: bucket.tiles] if bucket.tiles else None,
        )

    def _fill(self, batch: ForwardBatch, bucket: Bucket) -> None:
        num_tokens, num_sequences, n = len(batch.token_ids), len(batch.query_lens), batch.num_decodes
        for buffer, values in (
            (self._token_ids, batch.token_ids),
            (self._positions, batch.positions),
            (self._kv_slots, batch.kv_slots),
            (self._token_class, batch.token_class),
            (self._context_lens, batch.context_lens[:n]),
        ):
            buffer[: len(values)].copy_(values)
        # Places of the table beyond a sequence's blocks are never read.
        self._block_tables[:num_sequences, : batch.block_tables.shape[1]].copy_(batch.block_tables)
        self._pad(bucket, num_tokens, n)
        if bucket.tiles:
            num_logits = len(batch.logit_rows)
            self._logit_rows[:num_logits].copy_(batch.logit_rows)
            self._logit_rows[num_logits : bucket.sequences].zero_()  # a row that exists in every bucket
            tiles = query_tiles(batch.query_lens[n:], batch.context_lens_host[n:], self._tile_queries, n, n)
            self._tiles[: len(tiles)].copy_(to_device([tiles], self._device)[0])
            self._tiles[len(tiles) : bucket.tiles].zero_()

    def _pad(self, bucket: Bucket, num_tokens: int, num_decodes: int) -> None:
        """Make all rows of tokens from `num_tokens` on padding, and have no sequence from `num_decodes` on decode."""
        self._num_tokens.fill_(num_tokens)
        padding = slice(num_tokens, bucket.tokens)
        self._token_ids[padding].zero_()
        self._positions[padding].zero_()
        self._kv_slots[padding].fill_(self._padding_slot)
        self._token_class[padding].zero_()
        # A decode step's attention reads a token of every row, a mixed one's none of a row without context.
        others = slice(num_decodes, bucket.sequences)
        self._context_lens[others].fill_(0 if bucket.tiles else 1)
        if not bucket.tiles:
            self._block_tables[others, 0].fill_(self._spare_block)
