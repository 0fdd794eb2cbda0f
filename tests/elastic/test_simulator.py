"""The simulator against an example computed by hand, and against conservation laws under every policy."""

from dataclasses import replace

import numpy as np
import pytest

from backend.elastic.arrivals import Arrivals, poisson
from backend.elastic.cost_model import CostModel
from backend.elastic.elastic_policy import ElasticPolicy, Links
from backend.elastic.experiment import ABLATIONS, POLICIES, Setup, make_policies, make_workload, run_policy
from backend.elastic.policies import ElasticOptions, Service, StaticPolicy, block_table
from backend.elastic.routing import RoutingPool, generate
from backend.elastic.simulator import Workload, simulate
from backend.elastic.united import published_loss, split

#: One expert takes 1 s to read and 1 s to compute for 2 tokens; a token travels in 0.25 s; a load takes 1 s from host
#: memory; other weights cost 0.5 s a layer.
COST = CostModel(
    expert_bytes=1e9,
    expert_flops=1.0,
    token_bytes=1.0,
    dense_bytes=0.5e9,
    dense_flops=0.0,
    kv_bytes=0.0,
    memory_bandwidth=1e9,
    matmul_rate=2.0,
    peer_bandwidth=4.0,
    host_bandwidth=1e9,
    exchange_s=0.0,
    launch_s=0.0,
    load_s=0.0,
    planning_s=0.0,
)


def fixed_pool(experts: list[list[int]]) -> RoutingPool:
    """One layer, one sequence whose tokens go to the given experts; no prediction."""
    routed = np.array(experts, np.int16)[:, None, :]
    starts = np.array([0, len(experts)])
    return RoutingPool(4, routed, np.full_like(routed, -1), starts, np.zeros(1, np.int64), "by hand")


def one_request(prompt: int, output: int) -> Arrivals:
    return Arrivals(np.array([1.0]), np.array([prompt]), np.array([output]), "by hand")


def test_static_parallelism_matches_the_hand_computed_example():
    # A prompt of 4 tokens: experts 0 (4 assignments), 1 (2), 2 (1), 3 (1); then one generated token's step on 0 and 1.
    pool = fixed_pool([[0, 1], [0, 1], [0, 2], [0, 3]])
    work = Workload(one_request(4, 2), pool, np.zeros(1, np.int64), devices=2)
    outcome = simulate(work, [StaticPolicy(block_table(4, 2), 4, COST, 2)], COST)
    # Prompt: device 0 computes 4/2 + 2/2 = 3 s, device 1 reads two experts: 2 s. Device 0 receives 6 assignments, half of
    # them from the other device, there and back: 2 * 6 * 0.5 / 4 = 1.5 s.
    # Decode: device 0 reads two experts: 2 s; 2 assignments travel 2 * 2 * 0.5 / 4 = 0.5 s.
    assert outcome.layer_s == pytest.approx([3 + 1.5, 2 + 0.5])
    assert outcome.e2e_s == pytest.approx([0.5 + 4.5 + 0.5 + 2.5])
    # Four experts of 1 GB, always on, from 0 to 1 + 8 s.
    assert outcome.cost_gb_s == pytest.approx(4 * 9)
    assert outcome.execution_gb_s == pytest.approx(4 * (4.5 + 2.5))
    assert outcome.assignments == outcome.served == 8 + 2


def test_functions_match_the_hand_computed_example():
    # One device, so nothing travels. The first step finds everything cold: it waits 1 s for each of two experts.
    pool = fixed_pool([[0, 1]])
    work = Workload(one_request(1, 2), pool, np.zeros(1, np.int64), devices=1)
    policy = ElasticPolicy(4, [2], COST, ElasticOptions(keep_alive_s=10.0), Links(1, COST, 1.0))
    outcome = simulate(work, [policy], COST)
    # Expert 0 arrives after 1 s and runs 1 s, meanwhile expert 1 arrives and runs 1 s: 3 s. Then both are warm: 2 s.
    assert outcome.layer_s == pytest.approx([3.0, 2.0])
    assert outcome.stalled_layers == 1 and policy.misses == 2
    # Loading began at 1.5 s; the end is at 1 + 0.5 + 3 + 0.5 + 2 = 7 s: two copies of 1 GB for 5.5 s.
    assert outcome.makespan_s == pytest.approx(7.0)
    assert outcome.cost_gb_s == pytest.approx(2 * 5.5)
    # Later both expire together, 10 s after their last use.
    assert policy.cost_gb_s(1000.0) == pytest.approx(2 * (7.0 + 10 - 1.5))


def test_a_deployed_policy_starts_warm_with_what_earlier_loads_need():
    policy = ElasticPolicy(4, [2], COST, ElasticOptions(keep_alive_s=10.0), Links(1, COST, 1.0))
    policy.warm_up([3.0, 1.0, 0.0, 0.0], 8.0)
    work = Workload(one_request(1, 2), fixed_pool([[0, 1]]), np.zeros(1, np.int64), devices=1)
    outcome = simulate(work, [policy], COST)
    assert outcome.layer_s == pytest.approx([2.0, 2.0]) and policy.misses == 0
    assert outcome.cost_gb_s == pytest.approx(2 * outcome.makespan_s)  # paid for from the start


def test_with_brownout_experts_beyond_the_threshold_leave_memory_and_united_ones_serve_them():
    options = ElasticOptions(keep_alive_s=2.0, threshold=0.7, way=4)
    policy = ElasticPolicy(4, [4, 4], COST, options, Links(2, COST, 1.0))
    policy.warm_up([6.0, 2.0, 1.0, 1.0], 10.0)
    # Experts 0 and 1 carry 8 of 10; the others are united's from the first step on, though they are asked for.
    assert {expert for expert, _ in policy.functions.copies()} == {0, 1}
    service = policy.serve([6, 2, 1, 1], 0.5)
    assert service.united == 2 and service.served == 10 and service.stall_s == 0


def test_an_expert_that_was_used_within_the_keep_alive_does_not_give_way_to_anothers_replicas():
    cost = replace(COST, peer_bandwidth=1e12)
    policy = ElasticPolicy(4, [2, 2], cost, ElasticOptions(keep_alive_s=10.0), Links(2, cost, 1.0))
    policy.warm_up([4.0, 4.0, 4.0, 4.0], 1e5)
    for step in range(1, 8):
        # Expert 0 takes all there is, and asks for replicas; the others are forgotten, but not cold.
        policy.expect([1e6, 0, 0, 0], float(step))
        policy.serve([1e6, 0, 0, 0], step + 0.5)
    assert {expert for expert, _ in policy.functions.copies()} == {0, 1, 2, 3}
    assert policy.serve([1, 1, 1, 1], 8.0).stall_s == 0 and policy.misses == 0
    for step in (30, 31):
        policy.expect([1e6, 0, 0, 0], float(step))
        policy.serve([1e6, 0, 0, 0], step + 0.5)
    assert policy.functions.copies() == {(0, 0), (0, 1)}


def test_a_plan_is_made_only_if_the_last_large_steps_would_have_been_shorter_with_it():
    options = ElasticOptions(keep_alive_s=1e3, straggler_factor=1.0)
    cost = replace(COST, peer_bandwidth=1e12)
    policy = ElasticPolicy(4, [3, 3], cost, options, Links(2, cost, 1.0))
    policy.functions.commit(policy.functions.prepare([(0, 0), (1, 0), (2, 1), (3, 1)], 0.0), 0.0)
    even, skewed = [1e6, 1e6, 1e6, 1e6], [1e6, 1e6, 1e3, 1e3]
    policy.expect(even, 1.0)
    policy.serve(even, 1.5)
    policy.expect(skewed, 2.0)
    assert policy.plans == 0, "skew is predicted, but no step has suffered from it"
    policy.serve(skewed, 2.5)
    policy.expect(skewed, 3.0)
    policy.expect(skewed, 4.0)
    assert policy.plans > 0 and policy.functions.warm_devices(0) != policy.functions.warm_devices(1)


def test_copies_share_an_experts_load_only_as_far_as_it_pays():
    service = Service(3)
    # 3 tokens: two parts pay (ridge at 2 tokens), on the devices that are least busy after the heavier expert.
    used = service.run([5, 3], [[0], [0, 1, 2]], COST)
    assert used == [(0, 0), (1, 1), (1, 2)]
    assert service.busy == pytest.approx([2.5, 1.0, 1.0]) and service.assignments == pytest.approx([5, 1.5, 1.5])


@pytest.fixture(scope="module")
def work() -> Workload:
    pool = generate(num_layers=2, num_experts=16, top_k=2, skew=1.0, domains=2, recall=0.9, distance=1, seed=1)
    arrivals = poisson(20.0, 1.5, 60, 20, seed=2)
    return make_workload(arrivals, pool, devices=4, layers=4, distance=1, drift_s=1.0, seed=3, max_batch_tokens=64)


@pytest.fixture(scope="module")
def setup() -> Setup:
    cost = CostModel(
        **{
            **COST.constants(),
            "expert_bytes": 1e7, "expert_flops": 1e7, "token_bytes": 1e3, "dense_bytes": 1e8, "dense_flops": 1e8,
            "memory_bandwidth": 1e12, "matmul_rate": 1e14, "peer_bandwidth": 1e11, "host_bandwidth": 2e10,
        }
    )  # fmt: skip
    return Setup(cost, slots_per_device=5, rebalance_s=0.2, loss=published_loss())


@pytest.mark.parametrize("name", [*POLICIES, *ABLATIONS])
def test_what_is_routed_is_served_within_memory_and_the_meter_adds_up(name, work, setup):
    policies = make_policies(name, work, setup)
    outcome = simulate(work, policies, setup.cost)
    computed = int((work.arrivals.input_tokens + work.arrivals.output_tokens - 1).sum())
    assert outcome.tokens == computed
    assert outcome.assignments == computed * 2 * 2  # 2 layers, 2 experts a token
    assert outcome.served == pytest.approx(outcome.assignments)
    assert len(outcome.e2e_s) == len(work.arrivals) and min(outcome.e2e_s) > 0
    assert outcome.peak_copies <= 4 * setup.slots_per_device
    always_on = work.repeat * 2 * setup.cost.expert_bytes * outcome.makespan_s / 1e9  # of one copy per layer
    assert 0 < outcome.cost_gb_s <= always_on * outcome.peak_copies * (1 + 1e-9)
    if name in ("static", "static_equal_memory", "eplb"):
        assert outcome.cost_gb_s == pytest.approx(always_on * policies[0].slots)
    assert (outcome.united > 0) == (name == "moeless_brownout")
    assert outcome.execution_gb_s <= outcome.cost_gb_s or name == "oracle"


def test_the_same_seed_gives_the_same_figures(work, setup):
    assert run_policy("moeless", work, setup) == run_policy("moeless", work, setup)


def test_an_idle_system_costs_nothing_once_the_keep_alive_has_passed(work, setup):
    (first, *_), setup = make_policies("moeless", work, setup), setup
    simulate(work, [first, *make_policies("moeless", work, setup)[1:]], setup.cost)
    later = first.cost_gb_s(1e4)
    assert first.cost_gb_s(1e5) == later > 0


def test_brownout_keeps_the_assignments_and_shares_united_experts():
    counts = [9, 1, 0, 2, 1, 0, 3, 0]
    originals, united = split(counts, 0.5, 4)
    # Expert 0 carries half of 16: it alone is kept. Group 0 has two more active members, 3 and 1, group 1 has 6 and 4.
    assert originals == [9, 0, 0, 0, 0, 0, 0, 0] and united == [3, 4]
    assert split(counts, 1.0, 4) == (counts, [0, 0])
    assert split([1, 0, 0, 0, 5, 0, 0, 0], 0.0, 4) == ([1, 0, 0, 0, 5, 0, 0, 0], [0, 0])  # singletons stay


def test_published_losses_are_interpolated():
    loss = published_loss()
    assert loss(0.0) == 0.0 and loss(0.3) == pytest.approx((1.59 + 2.66) / 2) and loss(1.0) == 15.77
