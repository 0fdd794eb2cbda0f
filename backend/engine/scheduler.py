"""One scheduling rule: computed tokens catch up with known tokens under one token budget, running sequences first.

Chunked prefill, prefix-cache hits and preemption by recompute fall out of it; prefill and decode share a batch. Plain
Python: no tensor library here.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from backend.engine.block_manager import BlockManager, chain_hashes
from backend.engine.lazy_heap import LazyHeap
from backend.engine.request import Sequence


@dataclass
class Schedule:
    """One step's work: sequences with the number of tokens to compute, those with one known token to go first."""

    sequences: list[Sequence] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    #: How many of the leading entries compute exactly one token.
    num_decodes: int = 0
    #: Entries that get no logits: known tokens of the sequence remain to be computed after this step.
    partial: list[int] = field(default_factory=list)
    #: Sequences that had no blocks before this step: nothing that is known of their earlier ones holds.
    admitted: list[Sequence] = field(default_factory=list)
    #: If this was made before the step before it was done: for each of the first sequences, the row of that step's tokens
    #: that is its input. The input of the others is known.
    previous_rows: list[int] | None = None

    def __bool__(self) -> bool:
        return bool(self.sequences)

    def ready(self) -> list[Sequence]:
        """Sequences that get logits, in the order of the logits' rows: with this step all their known tokens are computed."""
        if not self.partial:
            return self.sequences
        return [sequence for entry, sequence in enumerate(self.sequences) if entry not in self.partial]

    def unfinished(self) -> Schedule:
        """What is left of a step made ahead once the tokens before it are known."""
        left = [entry for entry, sequence in enumerate(self.sequences) if not sequence.finished]
        return Schedule([self.sequences[entry] for entry in left], [self.num_tokens[entry] for entry in left])


class Scheduler:
    """Waiting and running sequences, both in the order of `Sequence.sort_key`.

    A sequence is admitted with blocks for all its known tokens, so a prefill never stalls half-way; each running sequence
    takes further blocks as it grows, and when none is left the last one in order gives its blocks back and waits again.
    The pool must hold one sequence of `max_model_len` tokens: then the first in order can always go on, and nothing
    deadlocks.
    """

    def __init__(self, blocks: BlockManager, max_batch_tokens: int, max_running: int) -> None:
        self.blocks = blocks
        self.max_batch_tokens = max_batch_tokens
        # Every running sequence computes at least one token a step, so there are never more than the budget holds.
        self.max_running = min(max_running, max_batch_tokens)
        #: Where fewer than max_running are to run at once: those that do already go on, new ones wait.
        self.limit = self.max_running
        self.running: list[Sequence] = []
        self._waiting = LazyHeap()
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_free(self) -> int:
        """Sequences that could run besides those that do; below 0 while more run than should."""
        return self.limit - len(self.running)

    def add(self, sequence: Sequence) -> None:
        self._waiting.push(sequence.sort_key, sequence)

    def remove(self, sequence: Sequence, finish_reason: str) -> None:
        """Take a sequence out for good, wherever it is, and give its blocks back."""
        if sequence.finished:
            return
        sequence.finish_reason = finish_reason
        position = self._position(sequence)
        if position is not None:
            self.running.pop(position)
            self._give_back(sequence)
        else:
            self._waiting.ended()

    def schedule(self) -> Schedule:
        """Choose the next step's work and reserve its blocks."""
        decodes: list[Sequence] = []
        prefills: list[Sequence] = []
        num_preemptions = self.num_preemptions
        block_size = self.blocks.block_size
        for sequence in list(self.running):
            num_known, blocks = len(sequence.tokens), sequence.blocks
            # Preemption takes sequences from the end, so it never takes one that this loop has passed; it takes all blocks.
            if num_known <= len(blocks) * block_size or (blocks and self._grow(sequence)):
                (decodes if num_known - sequence.num_computed == 1 else prefills).append(sequence)
        # Admitting in a step that had to preempt would hand the same blocks back and forth.
        room = self.num_free if num_preemptions == self.num_preemptions else 0
        return self._with_chunks(decodes, prefills, room)

    def schedule_ahead(self, ready: list[Sequence], ends: Callable[[Sequence], bool]) -> Schedule | None:
        """The step after one that is booked, but whose tokens are not known yet.

        Args:
            ready: Sequences that get a token from that step, in the order of the tokens.
            ends: Whether a sequence ends with that token, whatever it is.

        Returns:
            What `schedule` would choose if no other sequence ended; None where there is nothing to do or a sequence would
            have to be preempted.
        """
        rows = {sequence: row for row, sequence in enumerate(ready) if not sequence.finished}
        decodes = [sequence for sequence in self.running if sequence in rows and not ends(sequence)]
        full = [s for s in decodes if s.num_computed == len(s.blocks) * self.blocks.block_size]
        if len(full) > self.blocks.num_available:
            return None
        for sequence, block in zip(full, self.blocks.allocate(len(full)), strict=True):
            sequence.blocks.append(block)
        prefills = [sequence for sequence in self.running if sequence not in rows]
        previous_rows = [rows[sequence] for sequence in decodes]
        work = self._with_chunks(decodes, prefills, self.limit - len(decodes) - len(prefills))
        work.previous_rows = previous_rows
        return work or None

    def _with_chunks(self, decodes: list[Sequence], prefills: list[Sequence], room: int) -> Schedule:
        """One token of each of `decodes`, and of `prefills` and at most `room` new sequences what the budget has left."""
        budget = self.max_batch_tokens - len(decodes)
        chunks: list[tuple[Sequence, int]] = []
        admitted: list[Sequence] = []
        for sequence in prefills:
            count = min(len(sequence.tokens) - sequence.num_computed, budget)
            if count == 0:
                break
            budget -= count
            chunks.append((sequence, count))
        while budget > 0 and len(admitted) < room and (sequence := self._admit()) is not None:
            count = min(len(sequence.tokens) - sequence.num_computed, budget)
            budget -= count
            chunks.append((sequence, count))
            admitted.append(sequence)
        chunks.sort(key=lambda chunk: chunk[1] != 1)
        num_decodes = len(decodes) + sum(count == 1 for _, count in chunks)
        work = Schedule(decodes, [1] * len(decodes), num_decodes, admitted=admitted)
        for sequence, count in chunks:
            if sequence.num_computed + count < len(sequence.tokens):
                work.partial.append(len(work.sequences))
            work.sequences.append(sequence)
            work.num_tokens.append(count)
        return work

    def computed(self, schedule: Schedule, pristine: Iterable[bool] | None = None) -> None:
        """Book a step as computed and publish the blocks that are now full. All tokens that go into it are known.

        `pristine`: for each sequence whether brownout replaced none of this step's experts; None: it replaced none at all.
        """
        if pristine is not None:
            for sequence, untouched in zip(schedule.sequences, pristine, strict=True):
                sequence.pristine = sequence.pristine and untouched
        block_size = self.blocks.block_size
        for sequence, count in zip(schedule.sequences, schedule.num_tokens, strict=True):
            num_computed = sequence.num_computed = sequence.num_computed + count
            # A single token fills a block only if it ends one.
            if count > 1 or num_computed % block_size == 0:
                self._publish(sequence)

    def _publish(self, sequence: Sequence) -> None:
        """Make the blocks findable that have become full."""
        block_size = self.blocks.block_size
        num_full = sequence.num_computed // block_size
        chain_hashes(sequence.tokens, block_size, sequence.hashes)
        for i in range(sequence.num_published, num_full):
            self.blocks.publish(sequence.blocks[i], sequence.hashes[i], sequence.pristine)
        sequence.num_published = num_full

    def _admit(self) -> Sequence | None:
        """Move the first waiting sequence to running if there are blocks for all its known tokens."""
        first = self._waiting.first()
        if first is None:
            return None
        sequence: Sequence = first[1]
        size = self.blocks.block_size
        hashes = chain_hashes(sequence.tokens, size, sequence.hashes)
        # At least one token is computed anew: its logits are needed.
        hit, pristine = self.blocks.match(hashes[: (len(sequence.tokens) - 1) // size], sequence.never_browned)
        needed = self.blocks.blocks_for(len(sequence.tokens)) - len(hit)
        # One spare block per running sequence, so that an admission does not cause a preemption in the next step.
        spare = len(self.running)
        if needed + spare > self.blocks.num_available_besides(hit):
            return None
        self._waiting.pop()
        self.blocks.acquire(hit)
        sequence.blocks.extend(hit)
        sequence.blocks.extend(self.blocks.allocate(needed))
        sequence.num_computed = len(hit) * size
        sequence.num_reused += sequence.num_computed
        sequence.num_published = len(hit)
        sequence.pristine = pristine
        insort(self.running, sequence, key=_sort_key)
        return sequence

    def _grow(self, sequence: Sequence) -> bool:
        """Give a running sequence blocks for all its known tokens, preempting from the end; False if it was itself."""
        needed = self.blocks.blocks_for(len(sequence.tokens)) - len(sequence.blocks)
        if needed <= 0:
            return True
        while needed > self.blocks.num_available:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks.extend(self.blocks.allocate(needed))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.pop(self._position(sequence))
        self._give_back(sequence)
        sequence.num_reused -= sequence.num_computed
        sequence.num_computed = 0
        sequence.num_published = 0
        self.num_preemptions += 1
        self.add(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.blocks)
        del sequence.blocks[:]

    def _position(self, sequence: Sequence) -> int | None:
        """Index in `running`, by binary search on the sort key (unique per sequence)."""
        low, high = 0, len(self.running)
        while low < high:
            middle = (low + high) // 2
            if self.running[middle].sort_key < sequence.sort_key:
                low = middle + 1
            else:
                high = middle
        return low if low < len(self.running) and self.running[low] is sequence else None


def _sort_key(sequence: Sequence) -> tuple:
    return sequence.sort_key
