"""Tiles of queries: each query is in one of them, at its row and position."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backend.kernels.query_tiles import num_tiles, query_tiles, tile_queries, tile_rows


@given(
    sequences=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 90)), max_size=6),
    queries=st.integers(1, 20),
    first=st.integers(0, 5),
)
def test_each_query_is_in_one_tile(sequences: list[tuple[int, int]], queries: int, first: int) -> None:
    """`sequences`: queries of each and cached tokens before them."""
    lens, contexts = [n for n, _ in sequences], [n + cached for n, cached in sequences]
    tiles = query_tiles(lens, contexts, queries, first, 2 * first).tolist()
    assert len(tiles) == num_tiles(lens, queries) and all(0 < count <= queries for *_, count in tiles)
    found = [(seq, row + i, position + i) for seq, row, position, count in tiles for i in range(count)]
    expected, row = [], 2 * first
    for seq, (n, cached) in enumerate(sequences, first):
        expected += [(seq, row + i, cached + i) for i in range(n)]
        row += n
    assert sorted(found) == expected
    positions = [position for _, _, position, _ in tiles]
    assert positions == sorted(positions, reverse=True), "those with most keys first"


def test_a_tile_has_room_for_all_heads_of_a_query() -> None:
    for group in (1, 3, 8, 200):
        for size in (2, 4):
            rows = tile_rows(group, size)
            assert rows & (rows - 1) == 0 and rows >= group
            assert tile_queries(group, size) == rows // group >= 1
    assert tile_queries(1, 2) == 128 and tile_queries(8, 2) == 16
