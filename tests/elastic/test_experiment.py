"""What the experiment claims of MoEless, on a small workload: latency and memory against periodic rebalancing, and the front."""

import numpy as np
import pytest

from backend.elastic.arrivals import poisson
from backend.elastic.cost_model import CostModel
from backend.elastic.experiment import Setup, against, front, make_workload, run_policy
from backend.elastic.routing import generate
from backend.elastic.united import published_loss
from backend.models.dummy import PREFIX, raw_config
from backend.models.registry import parse_config

LATENCIES = ("layer_ms_p50", "layer_ms_p99", "layer_ms_mean", "e2e_ms_p50")
NAMES = ("static", "static_equal_memory", "eplb", "moeless", "moeless_brownout")


@pytest.fixture(scope="module")
def windows() -> list[dict[str, dict]]:
    """Figures of the policies over three windows, whose traffic drifts from domain to domain."""
    cost = CostModel.of(parse_config(raw_config(PREFIX + "qwen1.5-moe-a2.7b")), "h200")
    setup = Setup(cost, slots_per_device=8, threshold=0.6, rebalance_s=0.25, loss=published_loss())
    pool = generate(num_layers=2, num_experts=24, top_k=4, skew=0.8, domains=3, recall=0.85, distance=1, seed=0)
    found = []
    for seed in range(3):
        arrivals = poisson(100.0, 1.0, 1000, 100, seed)
        work = make_workload(arrivals, pool, devices=4, layers=24, distance=1, drift_s=1.0, seed=seed)
        found.append({name: run_policy(name, work, setup) for name in NAMES})
    return found


def test_moeless_is_not_slower_than_periodic_rebalancing_and_holds_less_memory(windows):
    changes = [against(rows, "eplb", NAMES)["moeless"] for rows in windows]
    for key in LATENCIES:
        # A layer of a usual step is a whole number of reads long: its median moves in jumps or not at all.
        assert np.mean([change[key] for change in changes]) <= (0.5 if key == "layer_ms_p50" else 0.0), key
    assert max(change["cost_gb_s"] for change in changes) < 0


def test_moeless_with_brownout_is_on_the_front_of_latency_cost_and_quality(windows):
    for rows in windows:
        for latency in ("layer_ms_p50", "layer_ms_mean"):
            assert "moeless_brownout" in front(rows, latency)
        assert rows["moeless_brownout"]["cost_gb_s"] < rows["eplb"]["cost_gb_s"]
