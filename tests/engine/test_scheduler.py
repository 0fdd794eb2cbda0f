"""The scheduler's promises: budget, pool, order, progress, and that every sequence ends exactly once."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from backend.engine.block_manager import BlockManager
from backend.engine.request import PRIORITY_STEP_S, Request, Sequence
from backend.engine.sampling_params import SamplingParams
from backend.engine.scheduler import Schedule, Scheduler

QUALITIES = ("auto", "never")


def make_sequence(prompt, max_tokens=4, priority=0, arrival=0.0) -> Sequence:
    request = Request(object(), prompt, SamplingParams(max_tokens=max_tokens, priority=priority), arrival)
    return request.sequences[0]


def make_scheduler(num_blocks=16, block_size=4, max_batch_tokens=8, max_running=4) -> Scheduler:
    return Scheduler(BlockManager(num_blocks, block_size), max_batch_tokens, max_running)


def run_step(scheduler: Scheduler, next_token=lambda s: 1000 + len(s.tokens)) -> Schedule:
    """One step with an imaginary model: book, append a token where all known ones are computed, finish at max_tokens."""
    work = scheduler.schedule()
    before = [sequence.num_computed for sequence in work.sequences]
    ready = work.ready()
    scheduler.computed(work)
    after = [sequence.num_computed for sequence in work.sequences]
    assert after == [start + count for start, count in zip(before, work.num_tokens, strict=True)]
    assert ready == [sequence for sequence in work.sequences if sequence.num_computed == len(sequence.tokens)]
    for sequence in ready:
        sequence.tokens.append(next_token(sequence))
        if sequence.num_output >= sequence.request.params.max_tokens:
            scheduler.remove(sequence, "length")
    return work


def test_long_prompt_is_computed_in_chunks_of_the_budget():
    scheduler = make_scheduler()
    sequence = make_sequence(range(20), max_tokens=1)
    scheduler.add(sequence)
    chunks = [run_step(scheduler).num_tokens for _ in range(3)]
    assert chunks == [[8], [8], [4]]
    assert sequence.finished and not scheduler.running


def test_decodes_go_on_while_a_long_prompt_is_computed():
    scheduler = make_scheduler(num_blocks=64)
    short, long = make_sequence([1], max_tokens=8), make_sequence(range(30), arrival=1.0)
    scheduler.add(short)
    run_step(scheduler)
    scheduler.add(long)
    for _ in range(4):
        work = run_step(scheduler)
        assert work.sequences[0] is short and work.num_tokens[0] == 1 and work.num_decodes == 1
        assert sum(work.num_tokens) <= 8
    assert long.num_computed == 28


def test_prefix_of_an_earlier_sequence_is_not_computed_again():
    scheduler = make_scheduler(max_batch_tokens=32)
    first = make_sequence(list(range(12)), max_tokens=1)
    scheduler.add(first)
    run_step(scheduler)
    second = make_sequence([*range(12), 99], max_tokens=1)
    scheduler.add(second)
    work = scheduler.schedule()
    assert work.num_tokens == [1] and second.num_computed == 12


def test_identical_prompt_still_computes_one_token():
    scheduler = make_scheduler(max_batch_tokens=32)
    for _ in range(2):
        sequence = make_sequence(list(range(12)), max_tokens=1)
        scheduler.add(sequence)
        work = run_step(scheduler)
    assert work.num_tokens == [4], "the last block is computed anew for its logits"


def test_last_in_order_is_preempted_and_finishes_later():
    scheduler = make_scheduler(num_blocks=5, block_size=2, max_batch_tokens=16)
    first = make_sequence([1, 2], max_tokens=6, arrival=0.0)
    second = make_sequence([3, 4], max_tokens=6, arrival=1.0)
    scheduler.add(first)
    scheduler.add(second)
    for _ in range(60):
        if first.finished and second.finished:
            break
        run_step(scheduler)
        scheduler.blocks.check()
    assert first.finished and second.finished and scheduler.num_preemptions > 0
    assert second.num_output == 6
    assert scheduler.blocks.num_in_use == 0


def test_priority_goes_first_but_only_by_a_bounded_time():
    scheduler = make_scheduler(max_running=1)
    late_urgent = make_sequence([1], max_tokens=1, priority=-1, arrival=PRIORITY_STEP_S - 1)
    early = make_sequence([2], max_tokens=1, arrival=0.0)
    too_late_urgent = make_sequence([3], max_tokens=1, priority=-1, arrival=PRIORITY_STEP_S + 1)
    for sequence in (too_late_urgent, early, late_urgent):
        scheduler.add(sequence)
    order = [run_step(scheduler).sequences[0] for _ in range(3)]
    assert order == [late_urgent, early, too_late_urgent]


def test_removed_while_waiting_never_runs():
    scheduler = make_scheduler()
    sequences = [make_sequence([i], arrival=float(i)) for i in range(300)]
    for sequence in sequences:
        scheduler.add(sequence)
    for sequence in sequences[:-1]:
        scheduler.remove(sequence, "abort")
    assert scheduler.num_waiting == 1
    assert run_step(scheduler).sequences == sequences[-1:]


@given(seed=st.integers(0, 2**32), num_blocks=st.integers(4, 24), block_size=st.sampled_from([1, 2, 4]))
def test_no_never_sequence_stands_on_blocks_that_are_not_pristine(seed, num_blocks, block_size):
    rng = random.Random(seed)
    scheduler = make_scheduler(num_blocks, block_size, max_batch_tokens=12)
    #: What stands in each block: as many of its sequence's tokens, and whether all was computed without brownout.
    contents: dict[int, tuple[tuple[int, ...], bool]] = {}
    longest = num_blocks * block_size
    for now in range(300):
        if now < 150 and rng.random() < 0.5:
            prompt = [rng.randint(0, 1) for _ in range(rng.randint(1, longest - 1))]
            params = SamplingParams(max_tokens=1 + rng.randrange(longest - len(prompt)), brownout=rng.choice(QUALITIES))
            scheduler.add(Request(object(), prompt, params, float(now)).sequences[0])
        work = scheduler.schedule()
        pristine_steps, expected = [], []
        for sequence, count in zip(work.sequences, work.num_tokens, strict=True):
            blocks, first = list(sequence.blocks), sequence.num_computed
            read = [contents[blocks[i]] for i in range(first // block_size)]
            assert all(tokens == tuple(sequence.tokens[: len(tokens)]) for tokens, _ in read), "a wrong block"
            never = sequence.request.params.brownout == "never"
            assert not never or all(pristine for _, pristine in read)
            pristine = never or rng.random() < 0.5
            # What is written is pristine if that is, and everything that it was computed from.
            partial = [contents[blocks[first // block_size]]] if first % block_size else []
            clean = pristine and all(before for _, before in read + partial)
            for i in range(first // block_size, (first + count - 1) // block_size + 1):
                contents[blocks[i]] = (tuple(sequence.tokens[: min((i + 1) * block_size, first + count)]), clean)
            pristine_steps.append(pristine)
            expected.append(clean)
        ready = work.ready()
        scheduler.computed(work, pristine_steps)
        assert [sequence.pristine for sequence in work.sequences] == expected
        for sequence in ready:
            sequence.tokens.append(len(sequence.tokens) % 2)
            if sequence.num_output >= sequence.request.params.max_tokens:
                scheduler.remove(sequence, "length")
        scheduler.blocks.check()


def test_a_lower_limit_lets_who_runs_go_on_and_the_others_wait() -> None:
    scheduler = make_scheduler(max_running=3, max_batch_tokens=6)
    for number in range(4):
        scheduler.add(make_sequence([number], max_tokens=3 + number, arrival=number))
    assert len(run_step(scheduler).sequences) == 3
    scheduler.limit = 1
    assert scheduler.num_free == -2
    assert [len(run_step(scheduler).sequences) for _ in range(5)] == [3, 3, 2, 1, 1]
    assert scheduler.num_waiting == 0


@settings(max_examples=120)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(4, 24),
    block_size=st.sampled_from([1, 2, 4]),
    max_batch_tokens=st.integers(1, 20),
    max_running=st.integers(1, 8),
)
def test_random_traces_keep_every_promise(seed, num_blocks, block_size, max_batch_tokens, max_running):
    rng = random.Random(seed)
    scheduler = make_scheduler(num_blocks, block_size, max_batch_tokens, max_running)
    longest = num_blocks * block_size
    alive: dict[int, Sequence] = {}
    expected: dict[int, int] = {}
    outputs: dict[int, list[int]] = {}
    now, added = 0.0, 0
    for _ in range(2000):
        now += 1
        if added < 25 and rng.random() < 0.5:
            length = rng.randint(1, longest - 1)
            max_tokens = rng.randint(1, longest - length)
            # Few distinct tokens, so that prefixes are shared.
            prompt = [rng.randint(0, 1) for _ in range(length)]
            sequence = make_sequence(prompt, max_tokens, rng.randint(-1, 1), now)
            number = sequence.request.number
            alive[number], expected[number] = sequence, max_tokens
            scheduler.add(sequence)
            added += 1
        if alive and rng.random() < 0.03:
            number = rng.choice(list(alive))
            scheduler.remove(alive.pop(number), "abort")
            del expected[number]
        if rng.random() < 0.1:
            scheduler.limit = rng.randint(1, max_running)
        first_running, num_running = scheduler.running[0] if scheduler.running else None, len(scheduler.running)
        work = run_step(scheduler, next_token=lambda s: len(s.tokens) % 3)
        assert sum(work.num_tokens) <= max_batch_tokens
        assert len(scheduler.running) <= max(scheduler.limit, num_running) <= max_running
        assert [n == 1 for n in work.num_tokens] == sorted((n == 1 for n in work.num_tokens), reverse=True)
        assert len(set(map(id, work.sequences))) == len(work.sequences)
        scheduler.blocks.check()
        held = [b for s in scheduler.running for b in s.blocks]
        assert scheduler.blocks.num_in_use == len(set(held)), "a block leaked"
        for sequence in scheduler.running:
            assert sequence.num_computed <= len(sequence.tokens)
            assert len(sequence.blocks) * block_size >= sequence.num_computed
            writable = list(sequence.blocks)[sequence.num_published :]
            assert all(held.count(b) == 1 for b in writable), "a block that will be written is shared"
        if first_running is not None:
            assert first_running in work.sequences or first_running.finished, "the first in order stood still"
        for number in [n for n, s in alive.items() if s.finished]:
            outputs[number] = alive.pop(number).tokens
        if added >= 25 and not alive:
            break
    assert not alive, "a sequence starved"
    assert set(outputs) == set(expected)
    assert scheduler.blocks.num_in_use == 0 and scheduler.num_waiting == 0 and not scheduler.running


def serve(seed: int, num_blocks: int, ahead: bool) -> tuple[dict[int, list[int]], int]:
    """Tokens of sequences that come one after the other, some of which end where nobody foresaw it; and steps made ahead.

    A step ahead is made before the tokens that go into it are known, and booked after.
    """
    rng, scheduler, made, num_ahead = random.Random(seed), make_scheduler(num_blocks, max_running=3), {}, 0
    coming = [
        (rng.randint(0, 8), i, make_sequence(range(rng.randint(1, 16)), rng.randint(1, 10), arrival=float(i)))
        for i in range(9)
    ]
    numbers = {sequence: i for _, i, sequence in coming}

    time, next_work = 0, None
    while coming or scheduler.running or scheduler.num_waiting:
        for entry in [entry for entry in coming if entry[0] <= time]:
            scheduler.add(entry[2])
            coming.remove(entry)
        work, next_work = next_work, None
        if work is None or all(sequence.finished for sequence in work.sequences):
            work = scheduler.schedule()
            scheduler.computed(work)
        ready = work.ready()
        if ahead and work:
            ends = lambda s: s.num_output + 1 >= s.request.params.max_tokens  # noqa: E731
            next_work = scheduler.schedule_ahead(ready, ends)
        if next_work is not None:
            num_ahead += 1
            unknown = len(next_work.previous_rows)
            assert [ready[row] for row in next_work.previous_rows] == next_work.sequences[:unknown]
            known = list(zip(next_work.sequences, next_work.num_tokens, strict=True))[unknown:]
            assert all(0 < n <= len(sequence.tokens) - sequence.num_computed for sequence, n in known)
            assert sum(next_work.num_tokens) <= scheduler.max_batch_tokens
            assert next_work.num_decodes == next_work.num_tokens.count(1) and len(known) + unknown <= 3
        for sequence in ready:
            if not sequence.finished:
                token = (sum(sequence.tokens[-5:]) * 31 + len(sequence.tokens) * 7) % 50
                sequence.tokens.append(token)
                made.setdefault(numbers[sequence], []).append(token)
                if token % 7 == 0 or sequence.num_output >= sequence.request.params.max_tokens:
                    scheduler.remove(sequence, "stop")
        if next_work is not None:
            scheduler.computed(next_work.unfinished())
        time += 1
    scheduler.blocks.check()
    return made, num_ahead


@given(seed=st.integers(0, 10_000), num_blocks=st.sampled_from([8, 40]))
def test_steps_made_ahead_lead_to_the_same_tokens(seed: int, num_blocks: int):
    expected, none = serve(seed, num_blocks, ahead=False)
    found, _ = serve(seed, num_blocks, ahead=True)
    assert found == expected and none == 0


def never(_: Sequence) -> bool:
    return False


def test_a_step_ahead_admits_and_goes_on_with_prompts():
    scheduler = make_scheduler(max_running=3, max_batch_tokens=6)
    first, second = make_sequence([1, 2, 3, 4]), make_sequence(range(9), arrival=1.0)
    for sequence in (first, second):
        scheduler.add(sequence)
    work = scheduler.schedule()
    scheduler.computed(work)
    assert work.ready() == [first] and work.num_tokens == [4, 2]
    third = make_sequence([5], arrival=2.0)
    scheduler.add(third)

    ahead = scheduler.schedule_ahead([first], never)
    assert ahead.sequences == [first, second] and ahead.num_tokens == [1, 5] and ahead.previous_rows == [0]
    assert ahead.ready() == [first] and len(first.blocks) == 2, "room for a token that is not known"
    first.tokens.append(7)
    scheduler.computed(ahead.unfinished())

    ahead = scheduler.schedule_ahead([first], never)
    assert ahead.sequences == [first, third, second] and ahead.num_tokens == [1, 1, 2]
    assert ahead.num_decodes == 2 and ahead.admitted == [third] and ahead.ready() == ahead.sequences
    first.tokens.append(8)
    scheduler.remove(second, "abort")
    assert ahead.unfinished().sequences == [first, third]


def test_a_place_of_one_that_ends_is_given_away_ahead():
    scheduler = make_scheduler(max_running=1)
    first, second = make_sequence([1, 2]), make_sequence([3, 4], arrival=1.0)
    for sequence in (first, second):
        scheduler.add(sequence)
    scheduler.computed(scheduler.schedule())
    assert scheduler.schedule_ahead([first], never).sequences == [first], "no place is free"
    ahead = scheduler.schedule_ahead([first], lambda sequence: sequence is first)
    assert ahead.sequences == [second] and ahead.previous_rows == []


def test_no_step_is_made_ahead_without_work_or_blocks():
    scheduler = make_scheduler(num_blocks=4, max_batch_tokens=16)
    first, second = make_sequence([1, 2, 3, 4]), make_sequence(range(6, 14), arrival=1.0)
    for sequence in (first, second):
        scheduler.add(sequence)
    work = scheduler.schedule()
    scheduler.computed(work)
    assert scheduler.schedule_ahead(work.sequences, lambda _: True) is None
    assert work.sequences == [first, second] and scheduler.blocks.num_available == 1
    assert scheduler.schedule_ahead(work.sequences, never) is None, "one of two would have to be preempted"
    assert scheduler.blocks.num_available == 1, "and none is taken"
