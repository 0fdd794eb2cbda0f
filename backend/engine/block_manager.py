"""Paged KV bookkeeping: reference-counted blocks with a hash-chained prefix cache and LRU eviction.

A block is in exactly one state: *in use* (references > 0), *cached* (no references, contents findable by hash, evictable in
LRU order) or *free*. Only full, computed blocks are ever published under a hash, so a hit is always valid to read.

A block is *pristine* if brownout replaced nothing when it and all before it were computed. Others are published under a hash
of their own (`browned`), so that who wants the original model's keys and values never meets them.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from hashlib import blake2b


def chain_hashes(tokens: array, block_size: int, known: list[bytes]) -> list[bytes]:
    """Extend `known` in place to one hash per full block of `tokens`; each covers its block and all before it."""
    digest = known[-1] if known else b""
    for start in range(len(known) * block_size, len(tokens) - block_size + 1, block_size):
        digest = blake2b(digest + tokens[start : start + block_size].tobytes(), digest_size=16).digest()
        known.append(digest)
    return known


def browned(digest: bytes) -> bytes:
    """The hash of a block with the same tokens that is not pristine."""
    return digest + b"~"


class BlockManager:
    """Owner of block numbers 0 … num_blocks - 1. All operations are O(blocks touched)."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: deque[int] = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self.num_hit_tokens = 0

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out: free ones and evictable cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_in_use(self) -> int:
        return self.num_blocks - self.num_available

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match(self, hashes: Iterable[bytes], pristine: bool = False) -> tuple[list[int], bool]:
        """Blocks of the longest published prefix, pristine ones preferred, and whether all of them are.

        With `pristine` no others are taken. Nothing changes: `acquire` takes them.
        """
        found: list[int] = []
        all_pristine = True
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None and not pristine:
                block = self._block_of.get(browned(digest))
                all_pristine = all_pristine and block is None
            if block is None:
                break
            found.append(block)
        return found, all_pristine

    def num_available_besides(self, blocks: Iterable[int]) -> int:
        """Blocks that could still be handed out after `acquire(blocks)`."""
        return self.num_available - sum(1 for block in blocks if self._references[block] == 0)

    def acquire(self, blocks: Iterable[int]) -> None:
        """Take a reference to each of these cached or in-use blocks."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1
            self.num_hit_tokens += self.block_size

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks with undefined contents, evicting the least recently used cached ones if need be.

        The caller checks `num_available` first; running out here is a bug in the caller, not a state of the system.
        """
        if count > self.num_available:
            raise ValueError(f"{count} blocks asked for, {self.num_available} available")
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.popleft()
            else:
                block, _ = self._cached.popitem(last=False)
                self._unpublish(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a reference to each block of a sequence, given in sequence order.

        Released from the tail, so that eviction takes the end of a prefix before its beginning.
        """
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._hash_of[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None
            elif self._references[block] < 0:
                raise ValueError(f"block {block} released more often than taken")

    def publish(self, block: int, digest: bytes, pristine: bool = True) -> None:
        """Make a full, computed block findable. If another block already carries the hash, that one stays.

        A block that is not pristine is not published beside a pristine one, which serves everybody.
        """
        if not pristine:
            if digest in self._block_of:
                return
            digest = browned(digest)
        if digest not in self._block_of and self._hash_of[block] is None:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def clear_cache(self) -> None:
        """Forget every cached block (blocks in use stay published)."""
        while self._cached:
            block, _ = self._cached.popitem()
            self._unpublish(block)
            self._free.append(block)

    def check(self) -> None:
        """Raise AssertionError unless the states are consistent (tests and debugging)."""
        free, cached = set(self._free), set(self._cached)
        in_use = {block for block, count in enumerate(self._references) if count > 0}
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached and not free & in_use and not cached & in_use, "a block is in two states"
        assert len(free) + len(cached) + len(in_use) == self.num_blocks, "a block is lost"
        assert all(self._hash_of[block] is not None for block in cached), "a cached block has no hash"
        assert all(self._hash_of[block] is None for block in free), "a free block is published"
        assert {block: digest for digest, block in self._block_of.items()} == {
            block: digest for block, digest in enumerate(self._hash_of) if digest is not None
        }, "the hash tables disagree"

    def _unpublish(self, block: int) -> None:
        digest = self._hash_of[block]
        self._hash_of[block] = None
        if digest is not None:
            del self._block_of[digest]
