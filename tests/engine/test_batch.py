"""A batch holds what its schedule says: compared with the definition, token by token."""

from array import array

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.engine.batch import build_batch
from backend.engine.request import Request, Sequence
from backend.engine.sampling_params import SamplingParams
from backend.engine.scheduler import Schedule

BLOCK_SIZE = 4


@st.composite
def scheduled(draw) -> tuple[Sequence, int]:
    """A sequence with `num_prompt` prompt tokens and some output, of which the next `count` are to be computed."""
    prompt = draw(st.lists(st.integers(0, 99), min_size=1, max_size=12))
    output = draw(st.lists(st.integers(0, 99), max_size=6))
    params = SamplingParams(brownout=draw(st.sampled_from(["auto", "never"])))
    sequence = Request("r", prompt, params).sequences[0]
    sequence.tokens += output
    sequence.num_computed = draw(st.integers(0, len(sequence.tokens) - 1))
    blocks = -(-len(sequence.tokens) // BLOCK_SIZE) + draw(st.integers(0, 2))
    sequence.blocks = array("i", draw(st.lists(st.integers(0, 999), min_size=blocks, max_size=blocks)))
    return sequence, draw(st.integers(1, len(sequence.tokens) - sequence.num_computed))


@settings(max_examples=100)
@given(st.lists(scheduled(), min_size=1, max_size=6))
def test_batch_is_what_the_schedule_says(chosen):
    chosen.sort(key=lambda entry: entry[1] != 1)
    counts = [count for _, count in chosen]
    batch = build_batch(
        Schedule([sequence for sequence, _ in chosen], counts, counts.count(1)), BLOCK_SIZE, torch.device("cpu")
    )
    token_ids, positions, slots, classes, logit_rows, start = [], [], [], [], [], [0]
    for i, (sequence, count) in enumerate(chosen):
        for position in range(sequence.num_computed, sequence.num_computed + count):
            token_ids.append(sequence.tokens[position])
            positions.append(position)
            slots.append(sequence.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
            decode = count == 1 and position >= sequence.num_prompt
            classes.append(decode + 2 * (sequence.request.params.brownout == "never"))
        start.append(len(token_ids))
        if sequence.num_computed + count == len(sequence.tokens):
            logit_rows.append(len(token_ids) - 1)
        assert batch.block_tables[i, : len(sequence.blocks)].tolist() == list(sequence.blocks)
        assert not batch.block_tables[i, len(sequence.blocks) :].any()
    assert batch.token_ids.tolist() == token_ids and batch.positions.tolist() == positions
    assert batch.kv_slots.tolist() == slots and batch.token_class.tolist() == classes
    assert batch.query_start.tolist() == start and batch.logit_rows.tolist() == logit_rows
    assert batch.context_lens.tolist() == batch.context_lens_host == [s.num_computed + n for s, n in chosen]
    assert batch.query_lens == counts and batch.num_decodes == counts.count(1)
    wide = (batch.token_ids, batch.positions, batch.kv_slots, batch.logit_rows)
    assert {t.dtype for t in wide} == {torch.int64} and batch.token_class.dtype == torch.int8
    assert {t.dtype for t in (batch.query_start, batch.context_lens, batch.block_tables)} == {torch.int32}
