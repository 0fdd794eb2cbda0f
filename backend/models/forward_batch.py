"""The input of one forward pass: tokens of many sequences laid end to end, with their places in the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ForwardBatch:
    """Letters: T tokens (rows) of this step, S sequences, B blocks in the longest block table, R rows that need logits.

    The first `num_decodes` sequences have exactly one query token each, the others any number >= 1. All tensors live on
    the model's device; `query_lens` and `context_lens_host` are host copies, so that nothing on the step path reads the
    device back.
    """

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, position of the token in its sequence
    kv_slots: Tensor  # [T] int64, block * block_size + offset where the token's K and V go
    query_start: Tensor  # [S + 1] int32, first row of each sequence; last entry T
    context_lens: Tensor  # [S] int32, tokens of the sequence in the KV cache after this step (its queries included)
    block_tables: Tensor  # [S, B] int32, padded with 0
    logit_rows: Tensor  # [R] int64, rows whose logits are wanted
    token_class: Tensor  # [T] int8: phase (0 prefill, 1 decode) + 2 * (request class is `never`)
    num_decodes: int
    query_lens: list[int]  # [S]
    context_lens_host: list[int]  # [S]
    num_tokens: Tensor | None = None  # [] int32, rows from here on are padding; None: there are none
    #: [W, 4] int32 of a step whose makeup only the device knows: prompts as `query_tiles`; `context_lens` is then 0 for
    #: sequences with prompts, and `num_decodes` and the host's copies mean nothing. None: of any other step.
    tiles: Tensor | None = None
