"""The sampler: right distributions, vLLM's penalties, and rows that do not depend on their neighbours."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper

from backend.engine import sampler
from backend.engine.sampler import Sampled, SampleRow, sample, uniform
from backend.engine.sampling_params import SamplingParams
from backend.kernels.cpu.nucleus import sample_row

GREEDY = SamplingParams(temperature=0)


def reference_probs(logits: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """The distribution that the parameters ask for, written out for one row in float64."""
    logits = logits.double()
    order = sorted(range(len(logits)), key=lambda i: (-logits[i].item(), i))
    scaled = torch.softmax(logits / params.temperature, -1)
    kept = order[: params.top_k] if params.top_k > 0 else order
    total, mass, nucleus = sum(scaled[i].item() for i in kept), 0.0, []
    for i in kept:
        if mass >= params.top_p * total:
            break
        mass += scaled[i].item()
        nucleus.append(i)
    nucleus = [i for i in nucleus if scaled[i] >= params.min_p * scaled[order[0]]]
    probs = np.zeros(len(logits))
    probs[nucleus] = scaled[nucleus].numpy()
    return probs / probs.sum()


def draw(logits: torch.Tensor, params: SamplingParams, count: int, seed: int = 1) -> np.ndarray:
    """How often each token was drawn in `count` draws from one row of logits."""
    drawn = np.zeros(len(logits), dtype=np.int64)
    for start in range(0, count, 1000):
        rows = [SampleRow(params, seed, position) for position in range(start, start + 1000)]
        for result in sample(logits.expand(1000, -1), rows):
            drawn[result.token_id] += 1
    return drawn


def assert_distributed(drawn: np.ndarray, probs: np.ndarray) -> None:
    """Chi-square at five standard deviations, rare tokens pooled; impossible tokens never."""
    assert drawn[probs == 0].sum() == 0
    expected = probs * drawn.sum()
    common = expected >= 5
    pooled_drawn = np.append(drawn[common], drawn[~common].sum())
    pooled = np.append(expected[common], expected[~common].sum())
    pooled_drawn, pooled = pooled_drawn[pooled > 0], pooled[pooled > 0]
    chi_square = ((pooled_drawn - pooled) ** 2 / pooled).sum()
    freedom = max(len(pooled) - 1, 1)
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom), (chi_square, freedom)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=3.0),
        SamplingParams(top_k=7),
        SamplingParams(top_k=100),
        SamplingParams(top_p=0.6),
        SamplingParams(top_p=0.99, temperature=2.0),
        SamplingParams(min_p=0.1),
        SamplingParams(top_k=20, top_p=0.8, min_p=0.02, temperature=1.3),
        SamplingParams(top_k=5, top_p=0.01),
    ],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(params: SamplingParams) -> None:
    logits = torch.randn(333, generator=torch.Generator().manual_seed(1)) * 2
    assert_distributed(draw(logits, params, 10_000), reference_probs(logits, params))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(top_p=0.9),
        SamplingParams(min_p=0.3),
        SamplingParams(top_k=60, top_p=0.9),
        SamplingParams(top_k=700, top_p=0.9),
        SamplingParams(top_k=3000),
    ],
    ids=str,
)
def test_flat_distributions_over_large_vocabularies(params: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where more tokens pass the filters than are looked at first."""
    logits = torch.randn(3001, generator=torch.Generator().manual_seed(2)) * 0.5
    probs = reference_probs(logits, params)
    drawn = draw(logits, params, 3000)
    assert drawn[probs == 0].sum() == 0
    for order in (np.arange(len(probs)), np.argsort(probs)):  # pooled by place and by probability
        pooled = np.array([part.sum() for part in np.array_split(probs[order], 40)])
        assert_distributed(np.array([part.sum() for part in np.array_split(drawn[order], 40)]), pooled)
    if params == SamplingParams():
        return  # sampled in the order of the vocabulary
    monkeypatch.setattr(sampler, "LARGE_VOCABULARY", 0)
    assert np.array_equal(draw(logits, params, 1000), draw_each(logits, params, 1000))


def draw_each(logits: torch.Tensor, params: SamplingParams, count: int) -> np.ndarray:
    """`draw` by the sorted row, in float64."""
    probs = reference_probs(logits, params)
    order = np.argsort(-logits.numpy(), kind="stable")
    ends = probs[order].cumsum()
    tokens = [order[np.searchsorted(ends, uniform(1, i) * ends[-1], side="right")] for i in range(count)]
    return np.bincount(tokens, minlength=len(probs))


def test_tokens_of_no_probability_are_never_drawn() -> None:
    logits = torch.full((200,), -torch.inf)
    logits[[3, 150, 199]] = torch.tensor([0.0, 1.0, 2.0])
    for params in (
        SamplingParams(),
        SamplingParams(top_p=0.999),
        SamplingParams(top_k=50),
        SamplingParams(min_p=0.001),
    ):
        assert_distributed(draw(logits, params, 3000), reference_probs(logits, params))


def test_filters_break_ties_by_the_lowest_id() -> None:
    logits = torch.zeros(300)
    for params, kept in (
        (SamplingParams(top_k=5), 5),
        (SamplingParams(top_p=0.1), 30),
        (SamplingParams(top_k=200, top_p=0.5), 100),
    ):
        drawn = draw(logits, params, 2000)
        assert drawn[:kept].sum() == 2000, params
        assert (drawn[:kept] > 0).all(), params


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(top_k=1), SamplingParams(temperature=1e-30)])
def test_greedy_takes_the_first_of_the_most_likely(params: SamplingParams) -> None:
    logits = torch.randn(4, 1000)
    logits[0, [70, 400, 999]] = 9.0
    logits[1, 999] = 9.0
    logits[2, 0] = 9.0
    results = sample(logits, [SampleRow(params, 0, 0)] * 4)
    assert [r.token_id for r in results] == [70, 999, 0, logits[3].argmax().item()]


def test_very_low_temperature_is_nearly_greedy() -> None:
    logits = torch.randn(8, 5000)
    results = sample(logits, [SampleRow(SamplingParams(temperature=2e-5), 1, i) for i in range(8)])
    assert [r.token_id for r in results] == logits.argmax(-1).tolist()


# --- independence of the batch --------------------------------------------------------------------------------------

some_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 3, 40, 64, 65, 200]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, -0.4]),
    min_tokens=st.sampled_from([0, 3]),
    stop_token_ids=st.sampled_from([(), (1, 900_000)]),
    logprobs=st.sampled_from([None, 0, 3]),
)
some_rows = st.builds(
    SampleRow,
    params=some_params,
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 5),
    prompt_ids=st.lists(st.integers(0, 9), max_size=4),
    output_ids=st.lists(st.integers(0, 9), max_size=4),
    eos_token_ids=st.just((2,)),
)


@given(
    rows=st.lists(some_rows, min_size=1, max_size=12),
    vocab=st.sampled_from([10, 64, 65, 700, 1600]),
    seed=st.integers(0, 100),
    rounded=st.booleans(),
    order=st.randoms(use_true_random=False),
)
def test_a_row_does_not_depend_on_its_neighbours(rows, vocab, seed, rounded, order) -> None:
    logits = torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(seed))
    if rounded:  # as from bfloat16: many ties
        logits = (logits * 4).round() / 4
    untouched = logits.clone()
    together = sample(logits, rows)
    assert torch.equal(logits, untouched)
    alone = [sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    assert together == alone
    shuffled = list(range(len(rows)))
    order.shuffle(shuffled)
    assert [together[i] for i in shuffled] == sample(logits[shuffled], [rows[i] for i in shuffled])


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(9, 3000)
    kinds = [SamplingParams(logprobs=2), GREEDY, SamplingParams(top_k=9), SamplingParams(top_p=0.9, temperature=4.0)]
    rows = [SampleRow(kinds[i % 4], i, 0) for i in range(9)]
    expected = sample(logits, rows)
    monkeypatch.setattr(sampler, "TILE_ELEMENTS", 1)
    assert sample(logits, rows) == expected


def test_a_device_that_sorts_whole_rows_chooses_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = (torch.randn(32, 3000) * 4).round() / 4  # with ties
    params = [
        SamplingParams(top_p=0.3 + 0.02 * i, min_p=0.01 * (i % 3), top_k=(0, 500)[i % 2], temperature=0.5 + 0.1 * i)
        for i in range(32)
    ]
    rows = [SampleRow(one, seed, 3) for seed, one in enumerate(params)]
    expected = sample(logits, rows)
    monkeypatch.setattr(
        sampler, "_sample_filtered", lambda x, maxima, best, *columns: sampler._sample_sorted(x, *columns)
    )
    assert sample(logits, rows) == expected
    tiles = list(sampler._tiles(list(range(9)), torch.empty(9, 2**21, device="meta"), sampler.SORTED_ELEMENTS))
    assert tiles == [[0, 1, 2, 3], [4, 5, 6, 7], [8]], "what is sorted at once is bounded"


def test_same_seed_and_position_give_the_same_token_and_others_do_not() -> None:
    logits = torch.zeros(1, 100_000)
    tokens = {
        (seed, position): sample(logits, [SampleRow(SamplingParams(), seed, position)])[0].token_id
        for seed in (0, 1, 2**64 - 1)
        for position in range(20)
    }
    assert len(set(tokens.values())) > 55
    assert sample(logits, [SampleRow(SamplingParams(), 1, 7)])[0].token_id == tokens[1, 7]


def test_uniform_numbers_are_uniform_over_positions_and_seeds() -> None:
    for numbers in ([uniform(5, i) for i in range(20_000)], [uniform(i, 5) for i in range(20_000)]):
        counts, _ = np.histogram(numbers, bins=100, range=(0, 1))
        assert_distributed(counts, np.full(100, 0.01))
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
        assert min(numbers) >= 0
        assert max(numbers) < 1


@settings(max_examples=100)
@given(
    logits=st.lists(st.integers(-40, 0), min_size=1, max_size=60),
    spread=st.sampled_from([0.003, 0.1, 1.0]),
    params=st.builds(
        SamplingParams,
        top_k=st.sampled_from([0, 2, 5, 30]),
        top_p=st.sampled_from([1.0, 0.9, 0.37, 0.01]),
        min_p=st.sampled_from([0.0, 0.061, 0.9]),
    ),
    u=st.floats(0, 1, exclude_max=True),
)
def test_sampling_by_buckets_is_sampling_from_the_sorted_row(logits, spread, params, u) -> None:
    row = torch.tensor(logits, dtype=torch.float32) * spread
    row -= row.max()
    token = sample_row(torch.exp(row).numpy(), u, params.top_k, params.top_p, params.min_p)
    probs = reference_probs(row, params)
    order = np.argsort(-row.numpy(), kind="stable")
    place = int(np.flatnonzero(order == token)[0])
    ends = probs[order].cumsum()
    assert ends[place] - probs[token] - 1e-6 <= u <= ends[place] + 1e-6  # the token covers u, rounding aside
    assert probs[token] > 0


# --- penalties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [0.7, 1.2, 3.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = torch.randn(6, 40)
    prompt, output = [1, 2, 3, 3], [4, 5, 4]
    rows = [SampleRow(SamplingParams(temperature=0, repetition_penalty=penalty), 0, 3, prompt, output)] * 6
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output] * 6), logits.clone())
    assert [r.token_id for r in sample(logits, rows)] == expected.argmax(-1).tolist()
    warm = SamplingParams(temperature=0.8, repetition_penalty=penalty)
    probs = torch.softmax(TemperatureLogitsWarper(0.8)(None, expected[:1]), -1)[0].double().numpy()
    drawn = np.zeros(40, dtype=np.int64)
    for result in sample(logits[:1].expand(5000, -1), [SampleRow(warm, 3, i, prompt, output) for i in range(5000)]):
        drawn[result.token_id] += 1
    assert_distributed(drawn, probs / probs.sum())


def test_presence_and_frequency_count_the_output_only() -> None:
    logits = torch.tensor([[5.0, 4.9, 4.0, 0.0]])

    def chosen(**penalties: float) -> int:
        params = SamplingParams(temperature=0, **penalties)
        return sample(logits, [SampleRow(params, 0, 3, [0, 0, 0], [1, 1, 1])])[0].token_id

    assert chosen(presence_penalty=2.0) == 0  # token 0 is in the prompt: not penalised
    assert chosen(presence_penalty=-0.2) == 1
    assert chosen(presence_penalty=-0.05) == 0
    assert chosen(frequency_penalty=-0.05) == 1  # three times 0.05
    assert chosen(frequency_penalty=-0.03) == 0


def test_presence_penalty_falls_on_each_token_once() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0]])
    once = SamplingParams(temperature=0, presence_penalty=0.9)
    more = SamplingParams(temperature=0, frequency_penalty=0.9)
    output = [0, 0, 0]
    assert sample(logits, [SampleRow(once, 0, 3, (), output)])[0].token_id == 0
    assert sample(logits, [SampleRow(more, 0, 3, (), output)])[0].token_id == 1


def test_no_end_before_min_tokens() -> None:
    logits = torch.tensor([[9.0, 8.0, 7.0, 6.0]])
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(1, 77))

    def chosen(position: int, params: SamplingParams) -> int:
        return sample(logits, [SampleRow(params, 0, position, eos_token_ids=(0,))])[0].token_id

    assert [chosen(i, params) for i in range(4)] == [2, 2, 0, 0]
    ignoring = SamplingParams(temperature=0, min_tokens=2, ignore_eos=True)
    assert chosen(0, ignoring) == 0  # it does not end anything


# --- log-probabilities and failures ---------------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = torch.randn(3, 500)
    params = SamplingParams(temperature=0.1, top_k=3, repetition_penalty=2.0, logprobs=5)
    rows = [
        SampleRow(params, 1, 0, [5], [6]),
        SampleRow(GREEDY, 1, 0),
        SampleRow(SamplingParams(temperature=2.0), 1, 0, need_logprob=True),
    ]
    results = sample(logits, rows)
    expected = logits.log_softmax(-1)
    assert results[1].logprob is None and results[1].top is None and results[1].rank is None
    for i in (0, 2):
        token = results[i].token_id
        assert results[i].logprob == pytest.approx(expected[i, token].item(), abs=1e-5)
        assert results[i].rank == 1 + (expected[i] > expected[i, token]).sum().item()
    best = expected[0].topk(5)
    assert [token for token, _ in results[0].top] == best.indices.tolist()
    assert [value for _, value in results[0].top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert results[2].top is None


def test_logprobs_of_more_tokens_than_there_are() -> None:
    result = sample(torch.zeros(1, 3), [SampleRow(SamplingParams(logprobs=10), 0, 0)])[0]
    assert [token for token, _ in result.top] == [0, 1, 2]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize(
    "params",
    [GREEDY, SamplingParams(), SamplingParams(top_k=4), SamplingParams(top_p=0.5), SamplingParams(logprobs=2)],
    ids=str,
)
def test_only_the_row_that_is_not_finite_fails(params: SamplingParams, poison: float) -> None:
    logits = torch.randn(4, 900)
    rows = [SampleRow(params, i, 0) for i in range(4)]
    expected = sample(logits, rows)
    broken = logits.clone()
    broken[2, 517] = poison
    results = sample(broken, rows)
    assert results[2].token_id == -1 and "not finite" in results[2].error and results[2].top is None
    assert [r for i, r in enumerate(results) if i != 2] == [r for i, r in enumerate(expected) if i != 2]


def test_a_row_without_any_possible_token_fails() -> None:
    assert sample(torch.full((1, 9), -torch.inf), [SampleRow(SamplingParams(), 0, 0)])[0].error


def test_no_rows_no_tokens() -> None:
    assert sample(torch.zeros(0, 10), []) == []


def test_rows_and_logits_must_match() -> None:
    with pytest.raises(ValueError, match="2 rows of logits for 1"):
        sample(torch.zeros(2, 10), [SampleRow(GREEDY, 0, 0)])


def test_results_are_plain_python() -> None:
    result = sample(torch.randn(1, 100), [SampleRow(SamplingParams(logprobs=1), 0, 0)])[0]
    assert isinstance(result, Sampled)
    assert type(result.token_id) is int and type(result.logprob) is float and type(result.rank) is int


# --- GPU --------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_row_does_not_depend_on_its_neighbours_and_the_host_waits_once() -> None:
    kinds = [
        GREEDY,
        SamplingParams(logprobs=3),
        SamplingParams(top_k=40, top_p=0.9),
        SamplingParams(top_p=0.8, repetition_penalty=1.2),
        SamplingParams(min_p=0.1, frequency_penalty=0.5, min_tokens=4),
    ]
    rows = [SampleRow(kinds[i % 5], i, 3, [1, 2], [3, 3, 4], (0,)) for i in range(20)]
    logits = torch.randn(20, 151_936, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            together = sample(logits, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not caught, "the host waits only when the tokens are read"
    assert together == [sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_resolves_ties_and_errors_as_a_cpu_does() -> None:
    """Among equals the lowest id, also where the equals are far apart; a row with NaN or infinity has no token."""
    logits = torch.randn(6, 151_936)
    logits[:, [7, 140_000, 70_000]] = 9.0
    logits[1, 3], logits[2, 151_000], logits[3, :] = float("nan"), float("inf"), float("-inf")
    rows = [SampleRow(GREEDY, 0, 0)] * 6
    assert sample(logits.cuda(), rows) == sample(logits, rows)
