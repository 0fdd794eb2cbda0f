"""The metrics on Triton's own port: names, types and labels as documented, and they count what happened."""

from __future__ import annotations

import time

import pytest
from prometheus_client.metrics_core import Metric

from backend.serving.launch_client import RunningServer
from backend.serving.metrics import FLUSH_PERIOD_S
from tests.server.observe import read_families, read_metric
from tests.server.talk import ASK, ServerError, generate, sampling
from tests.waiting import wait_until

pytestmark = pytest.mark.server

#: Names as exposed, the labels beside model and version, and the type.
DOCUMENTED = {
    "moe_time_to_first_token_seconds": ("histogram", set()),
    "moe_inter_token_latency_seconds": ("histogram", set()),
    "moe_e2e_request_latency_seconds": ("histogram", set()),
    "moe_prompt_tokens_total": ("counter", set()),
    "moe_generation_tokens_total": ("counter", set()),
    "moe_requests_total": ("counter", {"outcome"}),
    "moe_preemptions_total": ("counter", set()),
    "moe_prefix_cache_hits_total": ("counter", set()),
    "moe_requests_running": ("gauge", set()),
    "moe_requests_waiting": ("gauge", set()),
    "moe_kv_cache_usage_ratio": ("gauge", set()),
    "moe_brownout_threshold": ("gauge", {"phase"}),
    "moe_active_slots": ("gauge", set()),
    "moe_united_assignment_ratio": ("gauge", set()),
    "moe_resident_expert_ratio": ("gauge", set()),
    "moe_expert_assignments_total": ("counter", set()),
    "moe_expert_misses_total": ("counter", set()),
    "moe_expert_stalls_total": ("counter", set()),
    "moe_expert_stall_seconds_total": ("counter", set()),
    "moe_expert_prefetches_total": ("counter", set()),
    "moe_expert_prefetch_hits_total": ("counter", set()),
    "moe_expert_moved_bytes_total": ("counter", set()),
    "moe_expert_workers": ("gauge", set()),
    "moe_expert_workers_lost_total": ("counter", set()),
    "moe_expert_workers_relieved_total": ("counter", set()),
    "moe_expert_layers_redone_total": ("counter", set()),
    "moe_expert_plan_changes_total": ("counter", set()),
    "moe_expert_exchanged_bytes_total": ("counter", set()),
    "moe_expert_slot_byte_seconds_total": ("counter", set()),
    "moe_expert_always_on_byte_seconds_total": ("counter", set()),
    "moe_expert_functions": ("gauge", {"state"}),
    "moe_expert_loads_total": ("counter", set()),
    "moe_expert_load_failures_total": ("counter", set()),
    "moe_expert_evictions_total": ("counter", set()),
    "moe_expert_refusals_total": ("counter", set()),
}
ENGINE_WIDE = (
    "moe_preemptions_total",
    "moe_prefix_cache_hits_total",
    "moe_kv_cache_usage_ratio",
    "moe_brownout_threshold",
    "moe_active_slots",
    "moe_united_assignment_ratio",
    "moe_resident_expert_ratio",
    "moe_expert_assignments_total",
    "moe_expert_misses_total",
    "moe_expert_stalls_total",
    "moe_expert_stall_seconds_total",
    "moe_expert_prefetches_total",
    "moe_expert_prefetch_hits_total",
    "moe_expert_moved_bytes_total",
    "moe_expert_workers",
    "moe_expert_workers_lost_total",
    "moe_expert_workers_relieved_total",
    "moe_expert_layers_redone_total",
    "moe_expert_plan_changes_total",
    "moe_expert_exchanged_bytes_total",
    "moe_expert_slot_byte_seconds_total",
    "moe_expert_always_on_byte_seconds_total",
    "moe_expert_functions",
    "moe_expert_loads_total",
    "moe_expert_load_failures_total",
    "moe_expert_evictions_total",
    "moe_expert_refusals_total",
)


def name_of(family: Metric) -> str:
    return f"{family.name}_total" if family.type == "counter" else family.name


@pytest.fixture(scope="module", autouse=True)
def some_traffic(server: RunningServer) -> None:
    time.sleep(1.5 * FLUSH_PERIOD_S)  # until what earlier tests asked for is counted
    before = read_metric(server, "moe_requests_total")
    for ask in ASK.values():
        ask(server, {"text_input": "Hi", "sampling_parameters": sampling(max_tokens=4)})
    wait_until(lambda: read_metric(server, "moe_requests_total") == before + len(ASK), 5, "counted")
    wait_until(lambda: set(ENGINE_WIDE) <= {name_of(family) for family in read_families(server).values()}, 5, "written")


@pytest.mark.parametrize("name", DOCUMENTED)
def test_metrics_have_their_documented_names_types_and_labels(server: RunningServer, name: str) -> None:
    kind, labels = DOCUMENTED[name]
    families = read_families(server)
    family = families[name.removesuffix("_total")]
    assert family.type == kind
    assert family.documentation
    plain = [sample for sample in family.samples if sample.name in (name, f"{name}_count")]
    assert all(set(sample.labels) == {"model", "version"} | labels for sample in plain)
    models = {sample.labels["model"] for sample in plain}
    assert models == ({"moe_llm"} if name in ENGINE_WIDE else {"moe_llm", "moe_llm_infer"})
    assert {sample.labels["version"] for sample in plain} == {"1"}


def test_thresholds_are_one_without_brownout(server: RunningServer) -> None:
    assert read_metric(server, "moe_brownout_threshold", phase="prefill") == 1
    assert read_metric(server, "moe_brownout_threshold", phase="decode") == 1


@pytest.mark.parametrize("interface", ASK)
def test_a_request_is_counted(server: RunningServer, interface: str) -> None:
    model = "moe_llm_infer" if interface.endswith("infer") else "moe_llm"
    streams = interface.endswith("stream")

    def read() -> dict[str, float]:
        return {
            "completed": read_metric(server, "moe_requests_total", model=model, outcome="completed"),
            "prompt": read_metric(server, "moe_prompt_tokens_total", model=model),
            "generation": read_metric(server, "moe_generation_tokens_total", model=model),
            "ttft": read_metric(server, "moe_time_to_first_token_seconds_count", model=model),
            "e2e": read_metric(server, "moe_e2e_request_latency_seconds_count", model=model),
            "itl": read_metric(server, "moe_inter_token_latency_seconds_count", model=model),
        }

    before = read()
    ASK[interface](server, {"text_input": "twelve bytes", "sampling_parameters": sampling(max_tokens=10)})
    more = {"completed": 1, "prompt": 12, "generation": 10, "ttft": streams, "e2e": 1}

    def counted() -> bool:
        after = read()
        # The first response may hold several tokens, the gaps after it count one latency a token.
        gaps = after["itl"] - before["itl"]
        exact = all(after[key] == before[key] + value for key, value in more.items())
        return exact and (1 <= gaps <= 9 if streams else gaps == 0)

    wait_until(counted, 5, f"counted: {before} and {more} more")


def test_a_refused_request_is_counted(server: RunningServer) -> None:
    before = read_metric(server, "moe_requests_total", model="moe_llm", outcome="invalid")
    with pytest.raises(ServerError):
        generate(server, {"text_input": ""})
    wait_until(
        lambda: read_metric(server, "moe_requests_total", model="moe_llm", outcome="invalid") == before + 1,
        5,
        "counted",
    )
