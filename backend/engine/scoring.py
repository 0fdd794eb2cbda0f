"""Log-probabilities of given text under the engine's model and its present settings.

Sampling never needs the log-probabilities of a prompt, so the step loop does not compute them. This runs the same model,
KV cache and settings over known tokens while the engine is idle, a stated number of sequences side by side.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from backend.engine.batch import build_batch
from backend.engine.engine import Engine
from backend.engine.prompt import check_prompt
from backend.engine.request import Request
from backend.engine.request import Sequence as EngineSequence
from backend.engine.sampling_params import SamplingParams
from backend.engine.scheduler import Schedule
from backend.errors import InvalidRequestError, UnavailableError

_PREFILL, _DECODE = 0, 1


@dataclass(frozen=True)
class Scored:
    """Of the scored tokens of one sequence: log-probability [n] float64, and whether each was the most likely one [n]."""

    logprobs: np.ndarray
    greedy: np.ndarray


class Scorer:
    """Scores sequences on an idle engine, `batch` of them at once.

    With `decode` every step computes one token of each sequence, under the decode threshold, as in generation; otherwise as
    many as the engine's `max_batch_tokens` allows, under the prefill threshold. `after_step` is called after each step, and
    `on_logits` with the scored tokens' logits [R, vocab] and the numbers [R] of the sequences that they belong to.
    """

    def __init__(
        self,
        engine: Engine,
        batch: int = 32,
        decode: bool = False,
        after_step: Callable[[], None] = lambda: None,
        on_logits: Callable[[Sequence[int], torch.Tensor], None] = lambda owners, logits: None,
    ) -> None:
        self.engine, self.batch, self.decode = engine, batch, decode
        self.after_step, self.on_logits = after_step, on_logits
        self.chunk = 1 if decode else max(1, engine.config.max_batch_tokens // batch)

    def score(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[Scored]:
        """For each (token ids, first): the tokens from number `first` (at least 1) on, each given all before it.

        Raises InvalidRequestError for tokens that the model cannot take, UnavailableError if the engine has requests.
        """
        if self.engine.has_work:
            raise UnavailableError("text can only be scored while the engine has no requests")
        for ids, first in sequences:
            check_prompt(list(ids[:-1]), self.engine.max_model_len, self.engine.vocab_size)
            if not 1 <= first <= len(ids):
                raise InvalidRequestError(f"scoring must start between token 1 and {len(ids)}, got {first}")
        waiting = deque(range(len(sequences)))
        running: dict[int, EngineSequence] = {}
        found: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in sequences]
        try:
            while waiting or running:
                while waiting and len(running) < self.batch:
                    ids = sequences[waiting[0]][0]
                    needed = self.engine.blocks.blocks_for(len(ids))
                    if needed > self.engine.blocks.num_available:
                        break
                    sequence = EngineSequence(Request(waiting[0], list(ids), SamplingParams()), 0)
                    sequence.blocks.extend(self.engine.blocks.allocate(needed))
                    running[waiting.popleft()] = sequence
                self._step(sequences, running, found)
                for number in [n for n, s in running.items() if s.num_computed == s.num_prompt - 1]:
                    self.engine.blocks.release(running.pop(number).blocks)
        finally:
            for sequence in running.values():
                self.engine.blocks.release(sequence.blocks)
        return [Scored(*(np.concatenate([part[i] for part in parts]) for i in (0, 1))) for parts in found]

    @torch.inference_mode()
    def _step(
        self,
        sequences: Sequence[tuple[Sequence[int], int]],
        running: dict[int, EngineSequence],
        found: list[list[tuple[np.ndarray, np.ndarray]]],
    ) -> None:
        """Compute the next tokens of every running sequence; the last token of a sequence is never an input."""
        counts = {n: min(self.chunk, s.num_prompt - 1 - s.num_computed) for n, s in running.items()}
        order = sorted(running, key=lambda n: counts[n] != 1)
        work = Schedule([running[n] for n in order], [counts[n] for n in order])
        work.num_decodes = sum(count == 1 for count in work.num_tokens)
        device = self.engine.runner.device
        batch = build_batch(work, self.engine.config.block_size, device)
        rows, targets, owners, sizes, start = [], [], [], [], 0
        for n, count in zip(order, work.num_tokens, strict=True):
            (ids, first), done = sequences[n], running[n].num_computed
            skipped = min(count, max(0, first - 1 - done))
            rows.extend(range(start + skipped, start + count))
            targets.extend(ids[done + 1 + skipped : done + 1 + count])
            sizes.append(count - skipped)
            owners.extend([n] * (count - skipped))
            start += count
        token_class = torch.full_like(batch.token_class, _DECODE if self.decode else _PREFILL)
        batch = replace(batch, logit_rows=torch.tensor(rows, dtype=torch.int64, device=device), token_class=token_class)
        logits = self.engine.runner.model.forward(batch, self.engine.runner.kv_cache)
        wanted = torch.tensor(targets, dtype=torch.int64, device=device).unsqueeze(1)
        chosen = logits.gather(1, wanted).squeeze(1)
        logprobs = (chosen.double() - logits.logsumexp(1).double()).cpu().numpy()
        greedy = (chosen >= logits.amax(1)).cpu().numpy()
        ends = np.cumsum(sizes)
        for n, count, end, size in zip(order, work.num_tokens, ends, sizes, strict=True):
            found[n].append((logprobs[end - size : end], greedy[end - size : end]))
            running[n].num_computed += count
        self.on_logits(owners, logits)
        self.after_step()
