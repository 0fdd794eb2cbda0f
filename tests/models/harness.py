"""A minimal greedy runner: drives a model over a paged KV cache without the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from backend.models import MoeModel
from backend.models.attention import KVCache
from backend.models.forward_batch import ForwardBatch


@dataclass
class Sequence:
    """Known tokens, how many of them are in the cache, and the blocks that hold them."""

    tokens: list[int]
    computed: int = 0
    blocks: list[int] = field(default_factory=list)


class Runner:
    """Runs steps of any mix of prefill chunks and decodes; blocks are handed out in a scattered order."""

    def __init__(self, model: MoeModel, block_size: int = 16, num_blocks: int = 256) -> None:
        self.model, self.block_size = model, block_size
        self.cache = KVCache(model.config, num_blocks, block_size, dtype=model.dtype, device=model.device)
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(block_size))
        self.free = order.tolist()

    def step(self, work: list[tuple[Sequence, int]]) -> Tensor:
        """Compute the next n known tokens of each sequence; logits [len(work), V] after the last of them."""
        work = sorted(work, key=lambda item: item[1] > 1 or item[0].computed == 0)  # decodes first
        self.order = [sequence for sequence, _ in work]
        ids, positions, slots, tables, classes = [], [], [], [], []
        for sequence, n in work:
            end = sequence.computed + n
            while len(sequence.blocks) * self.block_size < end:
                sequence.blocks.append(self.free.pop())
            for position in range(sequence.computed, end):
                ids.append(sequence.tokens[position])
                positions.append(position)
                slots.append(
                    sequence.blocks[position // self.block_size] * self.block_size + position % self.block_size
                )
                classes.append(0 if n > 1 or sequence.computed == 0 else 1)
            sequence.computed = end
            tables.append(sequence.blocks)
        lens = [n for _, n in work]
        starts = torch.tensor([0, *lens]).cumsum(0)
        longest = max(map(len, tables))
        contexts = [sequence.computed for sequence, _ in work]
        batch = ForwardBatch(
            token_ids=torch.tensor(ids),
            positions=torch.tensor(positions),
            kv_slots=torch.tensor(slots),
            query_start=starts.int(),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            block_tables=torch.tensor([t + [0] * (longest - len(t)) for t in tables], dtype=torch.int32),
            logit_rows=starts[1:] - 1,
            token_class=torch.tensor(classes, dtype=torch.int8),
            num_decodes=sum(c for c in (int(n == 1 and s.computed > 1) for s, n in work)),
            query_lens=lens,
            context_lens_host=contexts,
        )
        return self.model.forward(batch, self.cache)

    def generate(self, prompts: list[list[int]], new_tokens: int, chunk: int | None = None) -> list[list[int]]:
        """Greedy continuations; prompts are computed `chunk` tokens a step (None: whole), all sequences side by side."""
        sequences = [Sequence(list(prompt)) for prompt in prompts]
        remaining = {id(s): new_tokens for s in sequences}
        while any(remaining.values()):
            work = [(s, min(chunk or len(s.tokens), len(s.tokens) - s.computed)) for s in sequences if remaining[id(s)]]
            logits = self.step(work)
            for sequence, row in zip(self.order, logits, strict=True):
                if sequence.computed == len(sequence.tokens):
                    sequence.tokens.append(int(row.argmax()))
                    remaining[id(sequence)] -= 1
        return [s.tokens[len(p) :] for s, p in zip(sequences, prompts, strict=True)]


def prompt_logits(model: MoeModel, tokens: list[int], block_size: int = 16) -> Tensor:
    """Logits [len(tokens), V] at every position of one prompt computed as a whole."""
    runner = Runner(model, block_size)
    n = len(tokens)
    blocks = [runner.free.pop() for _ in range(-(-n // block_size))]
    positions = torch.arange(n)
    batch = ForwardBatch(
        token_ids=torch.tensor(tokens),
        positions=positions,
        kv_slots=torch.tensor(blocks)[positions // block_size] * block_size + positions % block_size,
        query_start=torch.tensor([0, n], dtype=torch.int32),
        context_lens=torch.tensor([n], dtype=torch.int32),
        block_tables=torch.tensor([blocks], dtype=torch.int32),
        logit_rows=positions,
        token_class=torch.zeros(n, dtype=torch.int8),
        num_decodes=0,
        query_lens=[n],
        context_lens_host=[n],
    )
    return model.forward(batch, runner.cache)
