"""A batch holds what its schedule says: compared with the definition, token by token, and from step to step."""

import random
from array import array
from collections import Counter
from dataclasses import fields

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.engine.batch import BatchBuilder, build_batch
from backend.engine.block_manager import BlockManager
from backend.engine.request import Request, Sequence
from backend.engine.sampling_params import SamplingParams
from backend.engine.scheduler import Schedule, Scheduler
from backend.models.forward_batch import ForwardBatch

BLOCK_SIZE = 4
CPU = torch.device("cpu")


@st.composite
def scheduled(draw) -> tuple[Sequence, int]:
    """A sequence with `num_prompt` prompt tokens and some output, of which the next `count` are to be computed."""
    prompt = draw(st.lists(st.integers(0, 99), min_size=1, max_size=12))
    output = draw(st.lists(st.integers(0, 99), max_size=6))
    params = SamplingParams(brownout=draw(st.sampled_from(["auto", "never"])))
    sequence = Request("r", prompt, params).sequences[0]
    sequence.tokens.extend(output)
    sequence.num_computed = draw(st.integers(0, len(sequence.tokens) - 1))
    blocks = -(-len(sequence.tokens) // BLOCK_SIZE) + draw(st.integers(0, 2))
    sequence.blocks = array("i", draw(st.lists(st.integers(0, 999), min_size=blocks, max_size=blocks)))
    return sequence, draw(st.integers(1, len(sequence.tokens) - sequence.num_computed))


@settings(max_examples=100)
@given(st.lists(scheduled(), min_size=1, max_size=6))
def test_batch_is_what_the_schedule_says(chosen):
    chosen.sort(key=lambda entry: entry[1] != 1)
    counts = [count for _, count in chosen]
    partial = [i for i, (sequence, count) in enumerate(chosen) if sequence.num_computed + count < len(sequence.tokens)]
    schedule = Schedule([sequence for sequence, _ in chosen], counts, counts.count(1), partial)
    batch = build_batch(schedule, BLOCK_SIZE, CPU)
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


def assert_same(found: ForwardBatch, expected: ForwardBatch) -> None:
    for name in [field.name for field in fields(ForwardBatch)]:
        one, other = getattr(found, name), getattr(expected, name)
        if isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype and torch.equal(one, other), name
        else:
            assert one == other, name


def serve(seed: int, num_blocks: int, budget: int, ahead: bool, steps: int = 60) -> Counter[str]:
    """Steps of random requests, also ones made ahead; each batch is compared with one made afresh. Counts what happened."""
    rng, seen = random.Random(seed), Counter[str]()
    scheduler = Scheduler(BlockManager(num_blocks, BLOCK_SIZE), budget, max_running=5)
    builder, alive, step_ahead = BatchBuilder(BLOCK_SIZE, CPU), [], None
    longest = num_blocks * BLOCK_SIZE
    for now in range(steps):
        if rng.random() < 0.4:  # joins, where it is urgent before others
            prompt = [rng.randint(0, 1) for _ in range(rng.randint(1, longest // 2))]
            params = SamplingParams(
                max_tokens=rng.randint(1, longest - len(prompt)),
                priority=rng.randint(-1, 1),
                brownout=rng.choice(["auto", "never"]),
            )
            alive.append(Request(now, prompt, params, float(now)).sequences[0])
            scheduler.add(alive[-1])
        if alive and rng.random() < 0.1:
            scheduler.remove(rng.choice(alive), "abort")
        work, step_ahead = step_ahead, None
        if work is None or all(sequence.finished for sequence in work.sequences):
            work = scheduler.schedule()
            if work:
                assert_same(builder.build(work), build_batch(work, BLOCK_SIZE, CPU))
            scheduler.computed(work)
        ready = work.ready()
        seen.update(mixed=0 < work.num_decodes < len(work.sequences), partial=len(work.partial))
        tokens = torch.tensor([rng.randint(0, 1) for _ in ready])
        if ahead and work:
            step_ahead = scheduler.schedule_ahead(ready, lambda s: s.num_output + 1 >= s.request.params.max_tokens)
        if step_ahead is not None:
            unknown = len(step_ahead.previous_rows)
            seen.update(ahead=1, ahead_mixed=0 < unknown < len(step_ahead.sequences))
            batch = builder.build(step_ahead, tokens)
            assert_same(batch, BatchBuilder(BLOCK_SIZE, CPU).build(step_ahead, tokens))
            known = zip(step_ahead.sequences[unknown:], step_ahead.num_tokens[unknown:], strict=True)
            expected = [int(tokens[row]) for row in step_ahead.previous_rows]
            expected += [token for s, n in known for token in s.tokens[s.num_computed : s.num_computed + n]]
            assert batch.token_ids.tolist() == expected
        for sequence, token in zip(ready, tokens.tolist(), strict=True):
            if not sequence.finished:
                sequence.tokens.append(token)
                if sequence.num_output >= sequence.request.params.max_tokens or rng.random() < 0.05:
                    scheduler.remove(sequence, "stop")
        if step_ahead is not None:
            scheduler.computed(step_ahead.unfinished())
        alive = [sequence for sequence in alive if not sequence.finished]
    seen.update(preempted=scheduler.num_preemptions, hit=scheduler.blocks.num_hit_tokens)
    return seen


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32), num_blocks=st.integers(6, 24), budget=st.sampled_from([5, 8, 40]), ahead=st.booleans()
)
def test_a_batch_that_follows_another_is_as_one_made_afresh(seed, num_blocks, budget, ahead):
    serve(seed, num_blocks, budget, ahead)


def test_the_random_steps_have_in_them_what_could_go_wrong():
    seen = serve(seed=0, num_blocks=10, budget=8, ahead=False) + serve(seed=1, num_blocks=16, budget=12, ahead=True)
    assert all(seen[name] > 0 for name in ("mixed", "partial", "ahead", "ahead_mixed", "preempted", "hit")), seen


def test_a_sequence_that_is_admitted_again_has_other_blocks():
    sequence = Request("r", list(range(7)), SamplingParams()).sequences[0]
    sequence.num_computed, sequence.blocks = 6, array("i", [3, 5])
    builder = BatchBuilder(BLOCK_SIZE, CPU)
    first = builder.build(Schedule([sequence], [1], 1))
    sequence.blocks[:] = array("i", [8, 9])
    again = builder.build(Schedule([sequence], [1], 1, admitted=[sequence]))
    assert again.block_tables.tolist() == [[8, 9]]
    assert first.block_tables.tolist() == [[3, 5]], "an earlier batch has changed"
