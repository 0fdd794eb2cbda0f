"""Decode graphs: buckets, padding and replay, with a graph that calls its function again in place of CUDA's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from backend.brownout.settings import Settings
from backend.config import EngineConfig
from backend.engine.cuda_graphs import DecodeGraphs, buckets_for
from backend.engine.engine import Engine
from backend.engine.model_runner import resolve_cuda_graphs
from backend.engine.request import Request, TokenOutput
from backend.engine.sampling_params import SamplingParams
from backend.errors import ConfigError
from backend.models.attention import KVCache
from backend.models.forward_batch import ForwardBatch

SPARE_BLOCK, BLOCK_SIZE = 9, 4


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
        columns = (batch.token_ids, batch.positions, batch.kv_slots, batch.context_lens, batch.token_class)
        first_blocks = batch.block_tables.gather(1, ((batch.context_lens - 1) // BLOCK_SIZE).long().unsqueeze(1))
        table = torch.stack([column.float() for column in (*columns, first_blocks[:, 0])], dim=1)
        table = table[batch.logit_rows]
        return table if logits is None else logits.copy_(table)

    def graphs(self, max_rows: int = 20) -> DecodeGraphs:
        return DecodeGraphs(
            self.forward,
            vocab_size=6,
            max_rows=max_rows,
            max_blocks=5,
            block_size=BLOCK_SIZE,
            spare_block=SPARE_BLOCK,
            device=torch.device("cpu"),
            record=lambda: self.record,
            set_record=lambda record: self.left.__setitem__(slice(None), record),
            new_graph=FakeGraph,
        )


def make_batch(rows: int, seed: int, logit_rows: list[int] | None = None) -> ForwardBatch:
    generator = torch.Generator().manual_seed(seed)
    context_lens = torch.randint(1, 5 * BLOCK_SIZE + 1, (rows,), generator=generator)
    longest = -(-int(context_lens.max()) // BLOCK_SIZE)
    return ForwardBatch(
        token_ids=torch.randint(0, 100, (rows,), generator=generator),
        positions=context_lens - 1,
        kv_slots=torch.randperm(SPARE_BLOCK * BLOCK_SIZE, generator=generator)[:rows],
        query_start=torch.arange(rows + 1).int(),
        context_lens=context_lens.int(),
        block_tables=torch.randint(0, SPARE_BLOCK, (rows, longest), generator=generator).int(),
        logit_rows=torch.tensor(list(range(rows)) if logit_rows is None else logit_rows),
        token_class=torch.randint(0, 4, (rows,), generator=generator).to(torch.int8),
        num_decodes=rows,
        query_lens=[1] * rows,
        context_lens_host=context_lens.tolist(),
    )


def test_buckets_grow_in_small_steps_and_end_at_the_most_rows() -> None:
    assert buckets_for(1) == [1]
    assert buckets_for(6) == [1, 2, 4, 6]
    assert buckets_for(16) == [1, 2, 4, 8, 16]
    assert buckets_for(41) == [1, 2, 4, 8, 16, 24, 32, 40, 41]


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=8), seed=st.integers(0, 1000))
def test_replays_give_what_the_step_itself_gives(sizes: list[int], seed: int) -> None:
    """Whatever an earlier, larger batch left in the buffers."""
    step = Step()
    graphs = step.graphs()
    for number, rows in enumerate(sizes):
        batch = make_batch(rows, seed + number)
        assert graphs.accepts(batch)
        assert torch.equal(graphs.run(batch), Step().forward(batch))
        assert torch.equal(step.left[0], batch.token_ids * 2), "the record has the rows of this step"


def test_padding_rows_are_counted_nowhere_and_write_to_the_spare_block() -> None:
    step = Step()
    graphs = step.graphs()
    graphs.run(make_batch(16, seed=1))
    graphs.run(make_batch(5, seed=2))
    padded = step.batch
    assert padded.num_tokens is not None and int(padded.num_tokens) == 5
    assert len(padded.token_ids) == 8
    assert padded.kv_slots[5:].tolist() == [SPARE_BLOCK * BLOCK_SIZE] * 3
    assert padded.context_lens[5:].tolist() == [1] * 3
    assert padded.block_tables[5:, 0].tolist() == [SPARE_BLOCK] * 3


def test_a_bucket_is_captured_once_for_each_variant_and_always_reads_the_same_addresses() -> None:
    step, FakeGraph.num_captured = Step(), 0
    graphs = step.graphs()
    graphs.capture_all()
    assert FakeGraph.num_captured == len(graphs.buckets)
    addresses = {name: value.data_ptr() for name, value in vars(step.batch).items() if isinstance(value, Tensor)}
    for rows in (3, 20, 1, 4):
        graphs.run(make_batch(rows, seed=rows))
        assert addresses == {n: v.data_ptr() for n, v in vars(step.batch).items() if isinstance(v, Tensor)}
    assert FakeGraph.num_captured == len(graphs.buckets)
    graphs.run(make_batch(3, seed=3), variant="reroute")
    assert FakeGraph.num_captured == len(graphs.buckets) + 1


def test_only_the_wanted_rows_have_logits() -> None:
    batch = make_batch(5, seed=3, logit_rows=[0, 3])
    assert torch.equal(Step().graphs().run(batch), Step().forward(batch))


def test_prefill_and_large_batches_are_not_for_graphs() -> None:
    graphs = Step().graphs(max_rows=4)
    assert not graphs.accepts(make_batch(5, seed=4))
    mixed = make_batch(3, seed=5)
    mixed.query_lens.append(7)
    assert not graphs.accepts(mixed)


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


def test_an_engine_with_graphs_makes_the_same_tokens() -> None:
    expected = generate(make_engine())
    engine, FakeGraph.num_captured = make_engine(), 0
    runner = engine.runner
    runner.kv_cache = KVCache(
        runner.model.config, runner.num_blocks + 1, runner.block_size, dtype=runner.model.dtype, device=runner.device
    )
    runner.graphs = runner.make_graphs(engine.config, FakeGraph)
    assert generate(engine) == expected
    assert FakeGraph.num_captured >= 3, "the batch shrinks through several buckets"


@pytest.mark.gpu
def test_graphs_on_a_gpu_make_the_tokens_of_single_launches_and_of_the_cpu() -> None:
    expected = generate(make_engine())
    assert generate(make_engine(device="cuda", cuda_graphs="off")) == expected
    assert generate(make_engine(device="cuda", cuda_graphs="on")) == expected


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
