"""A priority queue whose entries may end while they wait."""

from __future__ import annotations

import heapq
from typing import Any


class LazyHeap:
    """Items with a `finished` attribute, smallest key first.

    An item that ends while it waits is reported with `ended()`; its entry leaves when it surfaces, and the heap is rebuilt
    before such entries outnumber the live ones, so its size stays in proportion.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[Any, Any]] = []
        self._num_ended = 0

    def __len__(self) -> int:
        return len(self._entries) - self._num_ended

    def push(self, key: Any, item: Any) -> None:
        """`key` must be unique: items are not compared."""
        heapq.heappush(self._entries, (key, item))

    def first(self) -> tuple[Any, Any] | None:
        """The live entry (key, item) with the smallest key."""
        while self._entries and self._entries[0][1].finished:
            heapq.heappop(self._entries)
            self._num_ended -= 1
        return self._entries[0] if self._entries else None

    def pop(self) -> tuple[Any, Any]:
        """Remove and return what `first` returned."""
        return heapq.heappop(self._entries)

    def ended(self) -> None:
        """Say that one item in the heap has just finished."""
        self._num_ended += 1
        if self._num_ended > 64 and self._num_ended * 2 > len(self._entries):
            self._entries = [entry for entry in self._entries if not entry[1].finished]
            heapq.heapify(self._entries)
            self._num_ended = 0
