"""How attention divides the queries of prompts among programs. The host writes tables of tiles, kernels read them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Rows (queries times query heads of a KV head) of a tile; float32 is for comparisons, with tiles that registers hold.
_ROWS, _WIDE_ROWS = 128, 32


def tile_rows(group: int, element_size: int) -> int:
    """Rows of a tile if a KV head serves `group` query heads and numbers have `element_size` bytes: a power of 2."""
    return max(_WIDE_ROWS if element_size == 4 else _ROWS, 1 << (group - 1).bit_length())


def tile_queries(group: int, element_size: int) -> int:
    """Queries of a full tile."""
    return tile_rows(group, element_size) // group


def num_tiles(query_lens: Sequence[int], queries: int) -> int:
    """Tiles that so many queries take."""
    return sum(-(-n // queries) for n in query_lens)


def query_tiles(
    query_lens: Sequence[int], context_lens: Sequence[int], queries: int, first_sequence: int = 0, first_row: int = 0
) -> np.ndarray:
    """[W, 4] int32: sequence, row of the first query, its position, and number of queries (at most `queries`) of each tile.

    Args:
        query_lens: Queries of each sequence, rows end to end.
        context_lens: Cached tokens of each sequence, queries included.
        first_sequence, first_row: Numbers of the first sequence and of its first row.

    Those with most keys come first: they take longest.
    """
    tiles, row = [], first_row
    for sequence, (n, context) in enumerate(zip(query_lens, context_lens, strict=True), first_sequence):
        for first in range(0, n, queries):
            tiles.append((sequence, row + first, context - n + first, min(queries, n - first)))
        row += n
    tiles.sort(key=lambda tile: -tile[2])
    return np.array(tiles, np.int32).reshape(-1, 4)
