"""Blocks are never lost, shared wrongly or handed out twice; the prefix cache returns what was published."""

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.engine import block_manager
from backend.engine.block_manager import BlockManager


def chain_hashes(tokens: list[int], block_size: int, known: list[bytes]) -> list[bytes]:
    return block_manager.chain_hashes(array("q", tokens), block_size, known)


def test_chain_hash_covers_everything_before_the_block():
    same = chain_hashes([1, 2, 3, 4, 5, 6], 2, [])
    assert len(same) == 3
    assert chain_hashes([1, 2, 3, 4, 9, 9], 2, [])[:2] == same[:2]
    assert chain_hashes([9, 2, 3, 4, 5, 6], 2, [])[1:] != same[1:]
    assert chain_hashes([1, 2, 3], 2, []) == same[:1], "a part of a block has no hash"


def test_chain_hashes_extends_what_is_known():
    tokens = list(range(10))
    known = chain_hashes(tokens[:5], 2, [])
    assert chain_hashes(tokens, 2, known) == chain_hashes(tokens, 2, [])


def test_published_blocks_are_found_and_survive_their_owner():
    manager = BlockManager(4, 2)
    hashes = chain_hashes([1, 2, 3, 4], 2, [])
    blocks = manager.allocate(2)
    for block, digest in zip(blocks, hashes, strict=True):
        manager.publish(block, digest)
    manager.release(blocks)
    assert manager.match(hashes)[0] == blocks
    assert manager.num_available == 4 and len(manager._cached) == 2
    manager.acquire(blocks)
    assert manager.num_in_use == 2
    manager.check()


def test_eviction_takes_the_oldest_and_the_tail_of_a_prefix_first():
    manager = BlockManager(3, 1)
    hashes = chain_hashes([1, 2, 3], 1, [])
    blocks = manager.allocate(3)
    for block, digest in zip(blocks, hashes, strict=True):
        manager.publish(block, digest)
    manager.release(blocks)
    assert manager.allocate(1) == [blocks[2]]
    assert manager.match(hashes)[0] == blocks[:2]


def test_a_second_block_with_the_same_contents_is_not_published():
    manager = BlockManager(2, 1)
    (digest,) = chain_hashes([7], 1, [])
    first, second = manager.allocate(2)
    manager.publish(first, digest)
    manager.publish(second, digest)
    manager.release([second])
    assert len(manager._cached) == 0 and manager.match([digest]) == ([first], True)
    manager.check()


def test_blocks_that_are_not_pristine_are_found_by_those_who_accept_them_and_pristine_ones_preferred():
    manager = BlockManager(6, 1)
    hashes = chain_hashes([1, 2, 3, 4], 1, [])
    dim = manager.allocate(3)
    for block, digest in zip(dim, hashes, strict=False):
        manager.publish(block, digest, pristine=False)
    assert manager.match(hashes) == (dim, False)
    assert manager.match(hashes, pristine=True) == ([], True)
    (bright,) = manager.allocate(1)
    manager.publish(bright, hashes[0])
    assert manager.match(hashes) == ([bright, *dim[1:]], False)
    assert manager.match(hashes, pristine=True) == ([bright], True)
    bright, late = manager.allocate(2)
    manager.publish(bright, hashes[3])
    manager.publish(late, hashes[3], pristine=False)
    manager.release([late])
    assert len(manager._cached) == 0, "nobody needs a dim block beside a pristine one"
    manager.check()


def test_over_allocation_and_double_release_are_errors():
    manager = BlockManager(2, 4)
    with pytest.raises(ValueError, match="3 blocks asked for, 2 available"):
        manager.allocate(3)
    (block,) = manager.allocate(1)
    manager.release([block])
    with pytest.raises(ValueError, match="released more often"):
        manager.release([block])


@settings(max_examples=100)
@given(st.integers(1, 12), st.lists(st.tuples(st.sampled_from("arpc"), st.integers(0, 30)), max_size=60))
def test_random_operations_keep_the_states_consistent(num_blocks, operations):
    manager = BlockManager(num_blocks, 1)
    owners: list[list[int]] = []
    for operation, number in operations:
        if operation == "a":
            count = number % (num_blocks + 1)
            if count <= manager.num_available:
                blocks = manager.allocate(count)
                assert not {b for owner in owners for b in owner} & set(blocks), "a block in use was handed out"
                owners.append(blocks)
        elif operation == "r" and owners:
            manager.release(owners.pop(number % len(owners)))
        elif operation == "p" and owners:
            for i, block in enumerate(owners[number % len(owners)]):
                manager.publish(block, b"%d" % (number + i))
        elif operation == "c":
            found, _ = manager.match([b"%d" % number])
            manager.acquire(found)
            if found:
                owners.append(found)
        manager.check()
    for owner in owners:
        manager.release(owner)
    manager.check()
    assert manager.num_available == num_blocks
    manager.clear_cache()
    assert len(manager._cached) == 0
    manager.check()
