"""How long planning takes: scaler and placer on one layer whose load drifts from plan to plan.

python -m backend.elastic.planning_bench [--experts 60] [--devices 8] [--plans 500]

Processor time of this process, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from statistics import quantiles

from rich.console import Console

from backend.elastic.placer import Copy, place
from backend.elastic.scaler import scale, straggler_bound


def measure(experts: int, devices: int, plans: int, seed: int = 0) -> dict[str, float]:
    """Milliseconds per plan (p50, p99), mean imbalance and mean moves; a tenth of the experts is idle in each plan."""
    rng = random.Random(seed)
    popularity = [1000 / rank**0.8 for rank in range(1, experts + 1)]
    slots = -(-experts * 4 // (3 * devices))
    warm: frozenset[Copy] = frozenset()
    times, imbalance, moves = [], [], []
    for _ in range(plans):
        loads = [0.0 if rng.random() < 0.1 else round(mean * rng.uniform(0.7, 1.4)) for mean in popularity]
        start = time.process_time()
        bound = straggler_bound(loads, devices, 0.5, least=100)
        replicas = scale(loads, budget=slots * devices, max_replicas=devices, bound=bound)
        costs = [max(100.0, load / count) if count else 0.0 for load, count in zip(loads, replicas, strict=True)]
        placement = place(replicas, costs, [slots] * devices, warm)
        times.append(1e3 * (time.process_time() - start))
        imbalance.append(placement.imbalance)
        moves.append(placement.moves)
        warm = placement.copies
    cuts = quantiles(times, n=100)
    return {
        "plan_ms_p50": cuts[49],
        "plan_ms_p99": cuts[98],
        "mean_imbalance": sum(imbalance) / plans,
        "mean_moves": sum(moves) / plans,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="backend.elastic.planning_bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=60)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--plans", type=int, default=500, help="plans to make (default 500)")
    args = parser.parse_args(argv)
    if args.experts < 1 or args.devices < 1 or args.plans < 2:
        parser.error("--experts and --devices must be at least 1, --plans at least 2")
    console = Console()
    with console.status("planning"):
        result = measure(args.experts, args.devices, args.plans)
    console.print(
        f"{args.experts} experts on {args.devices} devices: {result['plan_ms_p50']:.2f} ms a layer (median), "
        f"{result['plan_ms_p99']:.2f} ms (p99); imbalance {result['mean_imbalance']:.3f}, "
        f"{result['mean_moves']:.1f} copies moved a plan"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
