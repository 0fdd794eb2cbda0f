"""How far a dimmed model's predictions are from the full model's, over the same text at the same batch composition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import psutil
import torch
from torch import Tensor

from backend.errors import ConfigError


class Divergence:
    """Keeps the full model's next-token distributions in one pass over sequences; later passes are compared with them.

    For `Scorer`: pass `observe` as its `on_logits`, and call `finish` after each pass.
    """

    def __init__(self, sizes: Sequence[int], vocab_size: int) -> None:
        """`sizes`: predicted tokens of each sequence. Raises ConfigError if their distributions do not fit into memory."""
        needed, free = 2 * sum(sizes) * vocab_size, psutil.virtual_memory().available
        if needed > free // 2:
            raise ConfigError(
                f"the distributions over {sum(sizes)} tokens need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free: "
                "give fewer --text-tokens"
            )
        #: Log-probabilities; float16 is off by at most 1/1000 of them, which is far below what dimming changes.
        self._full = [torch.empty(size, vocab_size, dtype=torch.float16) for size in sizes]
        self._seen = [0] * len(sizes)
        self._sums = np.zeros(len(sizes))
        self._recording = True

    def observe(self, owners: Sequence[int], logits: Tensor) -> None:
        """`logits` [R, vocab] of the sequences `owners` [R], whose tokens come in order."""
        found = logits.float().log_softmax(1).cpu()
        rows = []
        for owner in owners:
            rows.append(self._full[owner][self._seen[owner]])
            self._seen[owner] += 1
        if self._recording:
            for row, kept in zip(found, rows, strict=True):
                kept.copy_(row)
        elif rows:
            wanted = torch.stack(rows).float()
            np.add.at(self._sums, np.array(owners), (wanted.exp() * (wanted - found)).sum(1).double().numpy())

    def finish(self) -> np.ndarray:
        """End a pass. Returns by sequence the sum of its tokens' divergences KL(full || dimmed), in nats; the first pass gives 0."""
        assert self._seen == [len(rows) for rows in self._full]
        sums, self._sums = self._sums, np.zeros(len(self._full))
        self._seen, self._recording = [0] * len(self._full), False
        return sums
