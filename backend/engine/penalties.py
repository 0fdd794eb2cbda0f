"""What earlier tokens do to the logits: repetition, presence and frequency penalty, and min_tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from backend.engine.sampling_params import SamplingParams
from backend.kernels.transfer import to_device


@dataclass(slots=True)
class SampleRow:
    """What the sampler must know of one row of logits.

    `position` is the index of the token to be made, 0 for the first output token. `prompt_ids` and `output_ids` are
    read only if the parameters have penalties (arrays are quicker than lists), `eos_token_ids` only while `position <
    params.min_tokens`. Prompt and output ids are below the vocabulary's size.
    """

    params: SamplingParams
    seed: int
    position: int
    prompt_ids: Sequence[int] = ()
    output_ids: Sequence[int] = ()
    eos_token_ids: Sequence[int] = ()
    #: Report `logprob` and `rank` even if `params.logprobs` does not ask for it.
    need_logprob: bool = False


def penalised(x: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """[G, V] logits as penalties and min_tokens leave them: x itself if there are none, else a copy.

    The repetition penalty looks at prompt and output, presence and frequency penalty at the output only (as in vLLM and
    the OpenAI API). Until min_tokens are made, the tokens that would end the sequence have no probability.
    """
    if not any(_changes(row) for row in rows):
        return x
    vocab = x.shape[1]
    changes = [(_repetition, _seen(rows, vocab)), (_presence_frequency, _counted(rows, vocab))]
    ends = _ends(rows, vocab)
    if not ends and all(places is None for _, places in changes):
        return x
    flat = x.clone().view(-1)
    for change, places in changes:
        if places is not None:
            where, terms = to_device(places, x.device)
            flat[where] = change(flat[where], terms)
    if ends:
        flat.index_fill_(0, to_device([np.array(ends, np.int64)], x.device)[0], -torch.inf)
    return flat.view_as(x)


def _changes(row: SampleRow) -> bool:
    params = row.params
    return (
        row.position < params.min_tokens
        or params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
    )


def _repetition(values: Tensor, terms: Tensor) -> Tensor:
    return torch.where(values > 0, values / terms[0], values * terms[0])


def _presence_frequency(values: Tensor, terms: Tensor) -> Tensor:
    return values - terms[0] - terms[1]


def _seen(rows: Sequence[SampleRow], vocab: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Flat places of the tokens of prompt and output (with duplicates: they get the same value), [1, n] penalties."""
    ids, penalties = [], []
    for g, row in enumerate(rows):
        if row.params.repetition_penalty != 1:
            for part in (row.prompt_ids, row.output_ids):
                ids.append(np.asarray(part, np.int64) + g * vocab)
                penalties.append(np.full((1, len(part)), row.params.repetition_penalty, np.float32))
    return (np.concatenate(ids), np.concatenate(penalties, 1)) if ids else None


def _counted(rows: Sequence[SampleRow], vocab: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Flat places of the different output tokens, [2, n] what frequency and presence penalty subtract there."""
    ids, terms = [], []
    for g, row in enumerate(rows):
        frequency, presence = row.params.frequency_penalty, row.params.presence_penalty
        if frequency != 0 or presence != 0:
            different, counts = np.unique(np.asarray(row.output_ids, np.int64), return_counts=True)
            ids.append(different + g * vocab)
            terms.append(np.stack([frequency * counts, np.full(len(counts), presence)]).astype(np.float32))
    return (np.concatenate(ids), np.concatenate(terms, 1)) if ids else None


def _ends(rows: Sequence[SampleRow], vocab: int) -> list[int]:
    """Flat places of the tokens that may not be chosen yet."""
    places = []
    for g, row in enumerate(rows):
        if row.position < row.params.min_tokens:
            eos = () if row.params.ignore_eos else row.eos_token_ids
            places += [g * vocab + token for token in (*row.params.stop_token_ids, *eos) if token < vocab]
    return places
