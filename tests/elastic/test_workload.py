"""What is simulated: traces read, routing generated."""

import numpy as np
import pytest

from backend.elastic.arrivals import poisson, read_trace
from backend.elastic.routing import generate
from backend.errors import ConfigError


def test_plain_and_azure_traces_are_read(tmp_path):
    plain = tmp_path / "plain.csv"
    plain.write_text("arrival_s,input_tokens,output_tokens,service\n2.5,7,0,chat\n0.5,10,3,code\n")
    arrivals = read_trace(plain)
    assert arrivals.arrival_s.tolist() == [0.5, 2.5]
    assert arrivals.input_tokens.tolist() == [10, 7] and arrivals.output_tokens.tolist() == [3, 1]
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:59:59.5000000,374,44\n2023-11-16 19:00:01.2500000,396,109\n"
    )
    assert read_trace(azure).arrival_s.tolist() == pytest.approx([0.0, 1.75])
    later = tmp_path / "azure2024.csv"
    later.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,1,1\n2024-05-10 00:00:01+00:00,1,1\n"
    )
    assert read_trace(later).arrival_s.tolist() == pytest.approx([0.0, 0.99007])
    assert len(arrivals.window(1.0)) == 1 and arrivals.window(1.0, rate_scale=5.0).arrival_s.tolist() == [0.1, 0.5]
    assert arrivals.window(2.0, start=1.0).arrival_s.tolist() == [1.5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", "has columns a, b; needed are arrival_s"),
        ("arrival_s,input_tokens,output_tokens\n1,2,3\n1,x,3\n", "line 3"),
        ("arrival_s,input_tokens,output_tokens\n1,2\n", "line 2"),
        ("arrival_s,input_tokens,output_tokens\n", "no requests"),
    ],
)
def test_an_unusable_trace_is_named(tmp_path, content, message):
    path = tmp_path / "trace.csv"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_trace(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "absent.csv")


def test_a_window_without_requests_is_refused():
    with pytest.raises(ConfigError, match="no request between 0 and 1e-09 s"):
        poisson(5.0, 3.0, 10, 10, seed=0).window(1e-9)


def test_poisson_arrivals_have_the_stated_rate_and_sizes():
    arrivals = poisson(50.0, 100.0, 200, 20, seed=0)
    assert len(arrivals) == pytest.approx(5000, rel=0.06) and (np.diff(arrivals.arrival_s) >= 0).all()
    assert arrivals.input_tokens.mean() == pytest.approx(200, rel=0.06) and arrivals.output_tokens.min() >= 1


def make(**options):
    defaults = {"num_layers": 3, "num_experts": 20, "top_k": 4, "skew": 1.0, "domains": 2, "recall": 0.8}
    return generate(**{**defaults, "distance": 1, "seed": 5, **options})


def test_generated_routing_has_the_stated_skew_and_recall():
    pool = make()
    assert (np.diff(np.sort(pool.experts, axis=-1), axis=-1) > 0).all()  # K different experts
    assert np.isnan(pool.recall()[0]) and pool.recall()[1:] == pytest.approx([0.8, 0.8], abs=0.04)
    assert make(recall=1.0).recall()[1:] == [1.0, 1.0]
    uniform = make(skew=0.0).counts(np.arange(4096))
    assert uniform.max() < 1.25 * uniform.mean()
    first = np.flatnonzero(np.repeat(pool.domains, 256) == 0)
    skewed = np.sort(pool.counts(first), axis=1)[:, ::-1]
    assert (skewed[:, 0] > 2.5 * skewed.mean(1)).all()
    assert (pool.counts(np.arange(10)).sum(1) == 40).all()
    assert (pool.predicted_counts(np.arange(10))[0] == -1).all()


def test_drift_brings_one_domain_after_the_other_into_season():
    pool = make()
    times = np.linspace(0, 10, 2000, endpoint=False)
    chosen = pool.domains[pool.choose_sequences(times, 10.0, np.random.default_rng(0))]
    assert (chosen[:200] == 0).mean() > 0.9 and (chosen[900:1100] == 1).mean() > 0.9
    steady = pool.domains[pool.choose_sequences(times, 0.0, np.random.default_rng(0))]
    assert steady.mean() == pytest.approx(0.5, abs=0.05)


def test_impossible_generators_are_refused():
    with pytest.raises(ConfigError, match="recall between 0 and 1"):
        make(recall=1.5)
