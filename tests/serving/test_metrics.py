"""What reaches Triton's metrics is what happened."""

import statistics
from dataclasses import asdict

import pytest

from backend.experts.telemetry import ExpertTelemetry
from backend.serving.metrics import MAX_ITL_OBSERVATIONS, Metrics, thin
from backend.serving.protocol import Stats


class FakeMetric:
    def __init__(self):
        self.value, self.observed = 0.0, []

    def increment(self, value):
        assert value >= 0, "a counter never goes down"
        self.value += value

    def set(self, value):
        self.value = value

    def observe(self, value):
        self.observed.append(value)


class FakePbUtils:
    """The part of pb_utils that metrics use; keeps what was written by name and labels."""

    def __init__(self):
        outer = self
        self.metrics = {}

        class MetricFamily:
            COUNTER, GAUGE, HISTOGRAM = range(3)

            def __init__(self, name, description, kind):
                self.name, self.kind = name, kind

            def Metric(self, labels, buckets=None):
                assert (buckets is not None) == (self.kind == self.HISTOGRAM)
                extra = tuple(value for key, value in labels.items() if key not in ("model", "version"))
                metric = outer.metrics[self.name, *extra] = FakeMetric()
                return metric

        self.MetricFamily = MetricFamily


def make_stats(**overrides) -> Stats:
    values = {
        "num_preemptions": 0,
        "prefix_hit_tokens": 0,
        "kv_usage_ratio": 0.0,
        "client_running": 0,
        "client_waiting": 0,
        "load": 0,
        "threshold_prefill": 1.0,
        "threshold_decode": 1.0,
        "active_slots": 0.0,
        "united_share": 0.0,
        "experts": asdict(ExpertTelemetry()),
    }
    return Stats(**{**values, **overrides})


def test_requests_and_tokens_are_counted_once():
    pb_utils = FakePbUtils()
    metrics = Metrics(pb_utils, "moe_llm", "1", engine_wide=True)
    metrics.first_response(0.2)
    metrics.tokens(1, None)
    metrics.tokens(3, 0.06)
    metrics.ended("completed", 10, 0.5)
    metrics.ended("rejected", 7, None)
    for _ in range(2):  # a second flush adds nothing
        metrics.flush([make_stats(client_running=2, client_waiting=5, kv_usage_ratio=0.25, threshold_decode=0.5)])
    values = {name: metric.value for name, metric in pb_utils.metrics.items()}
    assert values["moe_generation_tokens_total",] == 4
    assert values["moe_prompt_tokens_total",] == 10
    assert values["moe_requests_total", "completed"] == 1 and values["moe_requests_total", "rejected"] == 1
    assert values["moe_requests_running",] == 2 and values["moe_requests_waiting",] == 5
    assert values["moe_kv_cache_usage_ratio",] == 0.25 and values["moe_brownout_threshold", "decode"] == 0.5
    assert pb_utils.metrics["moe_time_to_first_token_seconds",].observed == [0.2]
    assert pb_utils.metrics["moe_e2e_request_latency_seconds",].observed == [0.5]
    assert pb_utils.metrics["moe_inter_token_latency_seconds",].observed == pytest.approx([0.02] * 3)


def test_engine_counters_go_on_after_an_engine_restart():
    pb_utils = FakePbUtils()
    metrics = Metrics(pb_utils, "moe_llm", "1", engine_wide=True)
    for total in (5, 8, 2):  # 2: a new engine process
        metrics.flush([make_stats(num_preemptions=total)])
    assert pb_utils.metrics["moe_preemptions_total",].value == 10


def test_expert_pool_is_reported():
    pb_utils = FakePbUtils()
    metrics = Metrics(pb_utils, "moe_llm", "1", engine_wide=True)
    for misses in (3, 10):
        experts = ExpertTelemetry(
            resident_share=0.5, misses=misses, stalls=2, stall_s=0.25, prefetches=6, prefetch_hits=4, bytes_moved=5000,
            slot_byte_s=1e9, warm=30, loading=2, cold=28, loads=40, failures=1, evictions=7, always_on_byte_s=2e9,
        )  # fmt: skip
        metrics.flush([make_stats(experts=asdict(experts)), make_stats()])
    names = ("resident_expert_ratio", "expert_misses_total", "expert_stalls_total", "expert_prefetch_hits_total")
    assert [pb_utils.metrics[f"moe_{name}",].value for name in names] == [0.75, 10, 2, 4]
    names = ("moved_bytes_total", "stall_seconds_total", "prefetches_total", "slot_byte_seconds_total")
    assert [pb_utils.metrics[f"moe_expert_{name}",].value for name in names] == [5000, 0.25, 6, 1e9]
    names = ("loads_total", "load_failures_total", "evictions_total", "refusals_total", "always_on_byte_seconds_total")
    assert [pb_utils.metrics[f"moe_expert_{name}",].value for name in names] == [40, 1, 7, 0, 2e9]
    states = ("warm", "loading", "cold")
    assert [pb_utils.metrics["moe_expert_functions", state].value for state in states] == [30, 2, 28]


def test_only_one_model_reports_what_the_engine_shares():
    pb_utils = FakePbUtils()
    Metrics(pb_utils, "moe_llm_infer", "1", engine_wide=False).flush([make_stats(kv_usage_ratio=0.5)])
    assert ("moe_kv_cache_usage_ratio",) not in pb_utils.metrics


def test_thinning_keeps_quantiles():
    values = [(float(i), 1 + i % 3) for i in range(5000)]
    thinned = thin(values, MAX_ITL_OBSERVATIONS)
    full = [value for value, weight in values for _ in range(weight)]
    assert len(thinned) == MAX_ITL_OBSERVATIONS
    for percent in (10, 50, 90):
        index = percent - 1
        exact = statistics.quantiles(full, n=100)[index]
        assert statistics.quantiles(thinned, n=100)[index] == pytest.approx(exact, rel=0.03, abs=60)
    assert thin([(0.5, 2), (0.1, 1)], 10) == [0.5, 0.5, 0.1]
