"""Graphs of steps: buckets, padding and replay, with a graph that calls its function again in place of CUDA's."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from backend.brownout.settings import Settings
from backend.config import DEMO, EngineConfig
from backend.engine.cuda_graphs import StepGraphs, buckets_for, mixed_buckets_for
from backend.engine.engine import Engine
from backend.engine.model_runner import resolve_cuda_graphs
from backend.engine.request import Request, TokenOutput
from backend.engine.sampling_params import SamplingParams
from backend.engine.scheduler import Schedule
from backend.errors import ConfigError
from backend.kernels.query_tiles import query_tiles
from backend.models.attention import KVCache
from backend.models.forward_batch import ForwardBatch

SPARE_BLOCK, BLOCK_SIZE, TILE_QUERIES = 9, 4, 4


class FakeGraph:
    """Replays by calling the captured function; like a real graph it writes where the first result lies."""

    num_captured = 0

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        FakeGraph.num_captured += 1
        self.function, self.result = function, function()
        return self.result

    def replay(self) -> None:
        self.result.copy_(self.function())


class Step:
    """A stand-in for a model: its logits and record tell every input of a row."""

    def __init__(self) -> None:
        self.record = [torch.zeros(64, dtype=torch.int64)]
        self.left: list[Tensor] = []
        self.batch: ForwardBatch

    def forward(self, batch: ForwardBatch, logits: Tensor | None = None) -> Tensor:
        self.batch = batch
        rows = len(batch.token_ids)
        self.record[0][:rows] = batch.token_ids * 2
        columns = (batch.token_ids, batch.positions, batch.kv_slots, batch.token_class, *self.attended(batch))
        table = torch.stack([column.float() for column in columns], dim=1)[batch.logit_rows]
        return table if logits is None else logits.copy_(table)

    def attended(self, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """Of each row its context and the block of its last token, from what attention is told."""
        contexts, blocks = torch.zeros(2, len(batch.token_ids), dtype=torch.int64)
        n = len(batch.context_lens) if batch.tiles is not None else batch.num_decodes
        if batch.tiles is None:
            lens = batch.query_lens[n:], batch.context_lens_host[n:]
            tiles = query_tiles(*lens, TILE_QUERIES, n, n).tolist()
        else:
            tiles = batch.tiles.tolist()
        rows = [(i, i, int(context)) for i, context in enumerate(batch.context_lens[:n]) if context]
        rows += [(seq, row + i, first + i + 1) for seq, row, first, count in tiles for i in range(count)]
        for seq, row, context in rows:
            contexts[row], blocks[row] = context, batch.block_tables[seq, (context - 1) // BLOCK_SIZE]
        return contexts, blocks

    def graphs(self, max_rows: int = 20, max_tokens: int = 48, tile_queries: int | None = TILE_QUERIES) -> StepGraphs:
        return StepGraphs(
            self.forward,
            vocab_size=6,
            max_rows=max_rows,
            max_tokens=max_tokens,
            tile_queries=tile_queries,
            max_blocks=5,
            block_size=BLOCK_SIZE,
            spare_block=SPARE_BLOCK,
            device=torch.device("cpu"),
            record=lambda: self.record,
            set_record=lambda record, rows: self.left.__setitem__(slice(None), [record[0][:rows]]),
            new_graph=FakeGraph,
        )


def make_batch(
    num_decodes: int, seed: int, logit_rows: list[int] | None = None, prompts: Sequence[int] = ()
) -> ForwardBatch:
    """One token of each of so many sequences, then the last tokens of the context of others."""
    generator = torch.Generator().manual_seed(seed)
    query_lens = torch.tensor([1] * num_decodes + [*prompts])
    most = 5 * BLOCK_SIZE
    context_lens = query_lens + (torch.rand(len(query_lens), generator=generator) * (most + 1 - query_lens)).long()
    longest = -(-int(context_lens.max()) // BLOCK_SIZE)
    rows, ends = int(query_lens.sum()), query_lens.cumsum(0)
    sequence = torch.arange(len(query_lens)).repeat_interleave(query_lens)
    return ForwardBatch(
        token_ids=torch.randint(0, 100, (rows,), generator=generator),
        positions=torch.arange(rows) - ends[sequence] + context_lens[sequence],
        kv_slots=torch.randint(0, SPARE_BLOCK * BLOCK_SIZE, (rows,), generator=generator),
        query_start=torch.cat([torch.zeros(1), ends]).int(),
        context_lens=context_lens.int(),
        block_tables=torch.randint(0, SPARE_BLOCK, (len(query_lens), longest), generator=generator).int(),
        logit_rows=ends - 1 if logit_rows is None else torch.tensor(logit_rows),
        token_class=torch.randint(0, 4, (rows,), generator=generator).to(torch.int8),
        num_decodes=num_decodes,
        query_lens=query_lens.tolist(),
        context_lens_host=context_lens.tolist(),
    )


def run(graphs: StepGraphs, batch: ForwardBatch, variant: Hashable = None) -> Tensor:
    bucket = graphs.bucket_of(batch)
    assert bucket is not None
    return graphs.run(batch, bucket, variant)


def test_buckets_grow_in_small_steps_and_end_at_the_most_rows() -> None:
    assert buckets_for(1) == [1]
    assert buckets_for(6) == [1, 2, 4, 6]
    assert buckets_for(16) == [1, 2, 4, 8, 16]
    assert buckets_for(41) == [1, 2, 4, 8, 16, 24, 32, 40, 41]


def test_mixed_buckets_end_at_the_largest_step_or_where_launching_no_longer_matters() -> None:
    assert mixed_buckets_for(20) == [20]
    assert mixed_buckets_for(64) == [32, 64]
    assert mixed_buckets_for(100) == [32, 64, 96, 100]
    assert mixed_buckets_for(8192)[-1] == 1024


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 10), st.lists(st.integers(1, 12), max_size=3)).filter(lambda step: step[0] or step[1]),
        min_size=1,
        max_size=8,
    ),
    seed=st.integers(0, 1000),
)
def test_replays_give_what_the_step_itself_gives(steps: list[tuple[int, list[int]]], seed: int) -> None:
    """Decodes, prompts and chunks of prompts, whatever an earlier, larger step left in the buffers."""
    step = Step()
    graphs = step.graphs()
    for number, (num_decodes, prompts) in enumerate(steps):
        batch = make_batch(num_decodes, seed + number, prompts=prompts)
        assert torch.equal(run(graphs, batch), Step().forward(batch))
        assert torch.equal(step.left[0], batch.token_ids * 2), "the record has the rows of this step"


def test_padding_rows_are_counted_nowhere_and_write_to_the_spare_block() -> None:
    step = Step()
    graphs = step.graphs()
    run(graphs, make_batch(16, seed=1))
    run(graphs, make_batch(5, seed=2))
    padded = step.batch
    assert padded.num_tokens is not None and int(padded.num_tokens) == 5
    assert len(padded.token_ids) == 8
    assert padded.kv_slots[5:].tolist() == [SPARE_BLOCK * BLOCK_SIZE] * 3
    assert padded.context_lens[5:].tolist() == [1] * 3
    assert padded.block_tables[5:, 0].tolist() == [SPARE_BLOCK] * 3


def test_padding_rows_of_a_mixed_step_attend_to_nothing() -> None:
    step = Step()
    graphs = step.graphs()
    run(graphs, make_batch(10, seed=1, prompts=[12, 12, 9]))
    run(graphs, make_batch(2, seed=2, prompts=[7]))
    padded = step.batch
    assert padded.num_tokens is not None and padded.tiles is not None and int(padded.num_tokens) == 9
    assert len(padded.token_ids) == 32
    assert padded.kv_slots[9:].tolist() == [SPARE_BLOCK * BLOCK_SIZE] * 23
    assert padded.context_lens.count_nonzero() == 2
    assert sorted(padded.tiles[:2, 3].tolist()) == [3, 4]
    assert not padded.tiles[2:].any()


def test_a_bucket_is_captured_once_for_each_variant_and_always_reads_the_same_addresses() -> None:
    step, FakeGraph.num_captured = Step(), 0
    graphs = step.graphs()
    graphs.capture_all()
    captured = len(graphs.decode_buckets) + len(graphs.mixed_buckets)
    assert FakeGraph.num_captured == captured
    for prompts in ([], [5, 1]):
        run(graphs, make_batch(1, seed=0, prompts=prompts))
        addresses = {name: value.data_ptr() for name, value in vars(step.batch).items() if isinstance(value, Tensor)}
        for rows in (3, 18, 1, 4):
            run(graphs, make_batch(rows, seed=rows, prompts=prompts))
            assert addresses == {n: v.data_ptr() for n, v in vars(step.batch).items() if isinstance(v, Tensor)}
    assert FakeGraph.num_captured == captured
    run(graphs, make_batch(3, seed=3), variant="reroute")
    assert FakeGraph.num_captured == captured + 1


@pytest.mark.parametrize("prompts", [[], [6]])
def test_only_the_wanted_rows_have_logits(prompts: list[int]) -> None:
    batch = make_batch(5, seed=3, logit_rows=[0, 3], prompts=prompts)
    assert torch.equal(run(Step().graphs(), batch), Step().forward(batch))


def test_a_step_without_logits_has_none() -> None:
    batch = make_batch(0, seed=3, logit_rows=[], prompts=[9])
    assert run(Step().graphs(), batch).shape == (0, 6)


def test_steps_that_no_graph_is_for() -> None:
    graphs = Step().graphs(max_rows=4)
    assert graphs.bucket_of(make_batch(5, seed=4)) is None, "too many sequences decode"
    assert graphs.bucket_of(make_batch(4, seed=4, prompts=[3])) is None, "too many sequences"
    assert graphs.bucket_of(make_batch(1, seed=4, prompts=[18, 18, 18])) is None, "too many tokens"
    assert Step().graphs(tile_queries=None).bucket_of(make_batch(3, seed=5, prompts=[7])) is None, "no mixed steps"
    graphs = Step().graphs(max_rows=1000, max_tokens=1000, tile_queries=128)
    assert graphs.bucket_of(make_batch(0, seed=4, prompts=[2] * 16)) is not None
    assert graphs.bucket_of(make_batch(0, seed=4, prompts=[2] * 19)) is None, "too many prompts for so few tokens"
    long = make_batch(1, seed=4, prompts=[7])
    long.context_lens_host[0] = 9000
    assert graphs.bucket_of(long) is None, "a long context is split over processors"


def test_settings_for_graphs_fit_the_device() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert not resolve_cuda_graphs("auto", cpu) and not resolve_cuda_graphs("off", cuda)
    with pytest.raises(ConfigError, match="cuda_graphs is on, which needs a CUDA device"):
        resolve_cuda_graphs("on", cpu)


def make_engine(**options: object) -> Engine:
    settings = {"checkpoint": "dummy:tiny", "dtype": "float32", "device": "cpu", "max_model_len": 96, "max_running": 6}
    return Engine(EngineConfig(**{**settings, **options}))


def generate(engine: Engine) -> dict[object, list[int]]:
    tokens: dict[object, list[int]] = {}
    for number in range(5):
        params = SamplingParams(max_tokens=12 - number, temperature=0.0, ignore_eos=True)
        engine.add(Request(number, [(7 * number + i) % 500 for i in range(3 + 9 * number)], params))
    engine.set_settings(Settings(version=1, threshold_prefill=1.0, threshold_decode=1.0))
    while engine.has_work:
        for event in engine.step():
            assert isinstance(event, TokenOutput)
            tokens.setdefault(event.request_id, []).append(event.token_id)
    return tokens


def use_graphs(engine: Engine) -> None:
    runner = engine.runner
    settings = {"dtype": runner.model.dtype, "device": runner.device}
    runner.kv_cache = KVCache(runner.model.config, runner.num_blocks + 1, runner.block_size, **settings)
    runner.graphs = runner.make_graphs(engine.config, FakeGraph)


def test_an_engine_with_graphs_makes_the_same_tokens() -> None:
    expected = generate(make_engine())
    engine, FakeGraph.num_captured = make_engine(), 0
    use_graphs(engine)
    assert generate(engine) == expected
    assert FakeGraph.num_captured >= 3, "the batch shrinks through several buckets"


@pytest.mark.gpu
def test_graphs_on_a_gpu_make_the_tokens_of_single_launches_and_of_the_cpu() -> None:
    """With the weights of the demo: those of a dummy come from the device's own random numbers."""
    expected = generate(make_engine(checkpoint=DEMO))
    assert generate(make_engine(checkpoint=DEMO, device="cuda", cuda_graphs="off")) == expected
    assert generate(make_engine(checkpoint=DEMO, device="cuda", cuda_graphs="on")) == expected


def logits_of_steps(engine: Engine) -> list[Tensor]:
    """Of prompts, of decodes beside a prompt, and of decodes only; all tokens are given."""
    runner, made = engine.runner, []
    sequences = []
    for number in range(4):
        sequence = Request(
            number, [(7 * number + i) % 500 for i in range(20 + 9 * number)], SamplingParams()
        ).sequences[0]
        sequence.blocks.extend(range(6 * number, 6 * number + 6))
        sequences.append(sequence)
    for counts in ([18, 27, 36], [1, 1, 1, 46], [1, 1, 1, 1]):
        chosen = sequences[: len(counts)]
        made.append(runner.run(Schedule(chosen, counts, counts.count(1))).clone())
        for sequence, count in zip(chosen, counts, strict=True):
            sequence.num_computed += count
    return made


@pytest.mark.gpu
def test_bfloat16_graphs_on_a_gpu_have_the_logits_of_single_launches() -> None:
    """Not the same in every bit: padding rows lead to other tiles."""
    off, on = (
        logits_of_steps(make_engine(checkpoint=DEMO, dtype="bfloat16", device="cuda", cuda_graphs=setting))
        for setting in ("off", "on")
    )
    for single, replayed in zip(off, on, strict=True):
        assert (replayed - single).norm() < 2e-2 * single.norm()


def test_given_steps_have_logits_of_their_own_with_and_without_graphs() -> None:
    engine = make_engine()
    single = logits_of_steps(engine)
    use_graphs(engine)
    replayed = logits_of_steps(engine)
    assert [len(rows) for rows in single] == [3, 4, 4]
    for one, other in zip(single, replayed, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.gpu
def test_decode_steps_on_a_gpu_allocate_nothing() -> None:
    """Nothing that stays: what a step takes from the caching allocator it gives back."""
    engine = make_engine(device="cuda", cuda_graphs="on", max_model_len=512)
    params = SamplingParams(max_tokens=300, temperature=0.0, ignore_eos=True)
    for number in range(4):
        engine.add(Request(number, [number + 1] * 8, params))
    for _ in range(20):
        engine.step()
    before = torch.cuda.memory_stats()["segment.all.allocated"]
    for _ in range(100):
        engine.step()
    assert torch.cuda.memory_stats()["segment.all.allocated"] == before
