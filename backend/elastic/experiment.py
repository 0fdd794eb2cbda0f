"""The MoEless experiment: the same workload under every policy, ablations, and what the result hangs on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from backend.elastic.cost_model import CostModel
from backend.elastic.elastic_policy import ElasticPolicy, Links
from backend.elastic.policies import ElasticOptions, OraclePolicy, StaticPolicy, balanced_table, block_table
from backend.elastic.routing import RoutingPool
from backend.elastic.simulator import Outcome, Policy, Workload, simulate
from backend.elastic.united import LossCurve

POLICIES = ("static", "static_equal_memory", "eplb", "oracle", "moeless", "moeless_brownout")
#: MoEless without one of its parts: loads of the last step, one replica each, copies dealt out in turn.
ABLATIONS = {
    "moeless_without_predictor": {"use_predictor": False},
    "moeless_without_scaler": {"use_scaler": False},
    "moeless_without_placer": {"use_placer": False},
}
#: Quantiles of the layer latency that a result keeps, for pictures.
_QUANTILES = np.linspace(0, 1, 41)
#: Constants that the sensitivity varies, and the factors it applies; the last two are settings of MoEless.
VARIED: dict[str, tuple[float, ...]] = {
    "memory_bandwidth": (0.5, 2.0),
    "matmul_rate": (0.5, 2.0),
    "peer_bandwidth": (0.25, 4.0),
    "host_bandwidth": (0.25, 4.0),
    "exchange_s": (0.25, 4.0),
    "planning_s": (0.0, 10.0),
    "keep_alive_s": (0.01, 0.1, 10.0),
    "straggler_factor": (0.5, 2.0),
}
WINDOWED = ("static", "eplb", "moeless", "moeless_brownout")
SENSITIVE = ("static", "eplb", "oracle", "moeless")


@dataclass(frozen=True)
class Setup:
    """What a run of one policy needs beside the workload."""

    cost: CostModel
    #: Copies of a layer that each device's memory holds; static plain expert parallelism uses only what it needs.
    slots_per_device: int
    options: ElasticOptions = field(default_factory=ElasticOptions)
    #: θ of moeless_brownout.
    threshold: float = 0.8
    rebalance_s: float = 10.0
    loss: LossCurve | None = None


def make_policies(name: str, work: Workload, setup: Setup) -> list[Policy]:
    """One policy per layer of the workload's pool; `name` is one of POLICIES or ABLATIONS."""
    pool, cost, devices = work.pool, setup.cost, work.devices
    experts, capacity = pool.num_experts, [setup.slots_per_device] * work.devices
    slots = sum(capacity)
    if name == "static":
        table = block_table(experts, devices)
        return [StaticPolicy(table, experts, cost, devices) for _ in range(pool.num_layers)]
    if name in ("static_equal_memory", "eplb"):
        interval = setup.rebalance_s if name == "eplb" else None
        return [
            StaticPolicy(balanced_table(loads, capacity).devices, slots, cost, devices, interval)
            for loads in history(work)
        ]
    if name == "oracle":
        return [OraclePolicy(experts, capacity, cost, setup.options) for _ in range(pool.num_layers)]
    options = replace(setup.options, **ABLATIONS.get(name, {}))
    if name == "moeless_brownout":
        options = replace(options, threshold=setup.threshold)
    links = Links(devices, cost, work.repeat)
    policies = [ElasticPolicy(experts, capacity, cost, options, links) for _ in range(pool.num_layers)]
    for policy, loads in zip(policies, history(work), strict=True):
        policy.warm_up(loads, float(work.max_batch_tokens * pool.experts.shape[2]))
    return policies


def history(work: Workload) -> list[list[float]]:
    """Loads [L][E] of the sequences of the first tenth of the requests: what a placement made beforehand may know."""
    first = work.sequences[: max(1, len(work.sequences) // 10)]
    starts = work.pool.starts
    counts = sum(work.pool.counts(np.arange(starts[s], starts[s + 1])) for s in first)
    return [[float(count) for count in layer] for layer in counts]


def run_policy(
    name: str, work: Workload, setup: Setup, advance: Callable[[float], object] = lambda seconds: None
) -> dict[str, object]:
    """Simulate one policy; returns the figures of `figures`, and of one with expert functions their FunctionTelemetry.

    "functions", "plans" and "misses" (active experts without a warm copy) are sums over the pool's layers.
    """
    policies = make_policies(name, work, setup)
    outcome = simulate(work, policies, setup.cost, advance)
    result = figures(outcome, setup.loss if name == "moeless_brownout" else None)
    elastic = [policy for policy in policies if isinstance(policy, ElasticPolicy)]
    if elastic:
        telemetry = [asdict(policy.functions.telemetry(outcome.makespan_s)) for policy in elastic]
        result["functions"] = {key: sum(layer[key] for layer in telemetry) for key in telemetry[0]}
        result["plans"] = sum(policy.plans for policy in elastic)
        result["misses"] = sum(policy.misses for policy in elastic)
    return result


def figures(outcome: Outcome, loss: LossCurve | None) -> dict[str, object]:
    """A policy's figures as JSON values; times in ms, memory × time in GB·s (1e9 bytes)."""
    layer_ms = 1e3 * np.array(outcome.layer_s)
    e2e_ms = 1e3 * np.array(outcome.e2e_s)
    return {
        "layer_ms_p50": float(np.percentile(layer_ms, 50)),
        "layer_ms_p99": float(np.percentile(layer_ms, 99)),
        "layer_ms_mean": float(layer_ms.mean()),
        "e2e_ms_p50": float(np.percentile(e2e_ms, 50)),
        "e2e_ms_p99": float(np.percentile(e2e_ms, 99)),
        "cost_gb_s": outcome.cost_gb_s,
        "execution_gb_s": outcome.execution_gb_s,
        "quality_loss_percent": loss(outcome.united_share) if loss else 0.0,
        "united_share": outcome.united_share,
        "stalled_layer_ratio": outcome.stalled_layers / len(outcome.layer_s),
        "peak_copies": outcome.peak_copies,
        "makespan_s": outcome.makespan_s,
        "steps": outcome.steps,
        "tokens_per_step": outcome.tokens / outcome.steps,
        "layer_ms_quantiles": [float(value) for value in np.quantile(layer_ms, _QUANTILES)],
    }


def variations(setup: Setup) -> Iterable[tuple[str, float, Setup]]:
    """(constant, factor, setup with it) for the sensitivity."""
    for name, factors in VARIED.items():
        for factor in factors:
            if hasattr(setup.cost, name):
                yield (
                    name,
                    factor,
                    replace(setup, cost=replace(setup.cost, **{name: getattr(setup.cost, name) * factor})),
                )
            else:
                changed = replace(setup.options, **{name: getattr(setup.options, name) * factor})
                yield name, factor, replace(setup, options=changed)


def against(results: dict[str, dict], base: str, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Change in percent of latency and cost of each policy against `base`; negative is better.

    `execution_against_memory`: GB·s while running (a bill per use) against what `base` holds all the time.
    """
    keys = ("layer_ms_p50", "layer_ms_p99", "layer_ms_mean", "e2e_ms_p50", "cost_gb_s", "execution_gb_s")
    return {
        name: {
            **{key: 100 * (results[name][key] / results[base][key] - 1) for key in keys},
            "execution_against_memory": 100 * (results[name]["execution_gb_s"] / results[base]["cost_gb_s"] - 1),
        }
        for name in names
        if name in results
    }


def front(results: dict[str, dict], latency: str) -> list[str]:
    """Policies that no other beats in latency, GB·s and quality loss at once; the oracle is no candidate."""
    keys = (latency, "cost_gb_s", "quality_loss_percent")
    points = {name: [row[key] for key in keys] for name, row in results.items() if name != "oracle"}

    def beats(a: list[float], b: list[float]) -> bool:
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    return [name for name, point in points.items() if not any(beats(other, point) for other in points.values())]


def spread(changes: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """[least, median, most] of each policy's changes over several windows, each as `against` gives it."""
    return {
        name: {
            key: [float(value) for value in np.percentile([change[name][key] for change in changes], (0, 50, 100))]
            for key in row
        }
        for name, row in changes[0].items()
    }


def make_workload(
    arrivals, pool: RoutingPool, *, devices: int, layers: int, distance: int, drift_s: float, seed: int, **limits: int
) -> Workload:
    """Bind each request to a sequence of the pool; `layers`: real layers, spread over those of the pool."""
    rng = np.random.default_rng(seed)
    sequences = pool.choose_sequences(arrivals.arrival_s, drift_s, rng)
    return Workload(arrivals, pool, sequences, devices, layers / pool.num_layers, distance, **limits)
