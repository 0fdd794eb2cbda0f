"""The MoEless experiment: expert parallelism over several devices, simulated under every policy.

python -m backend.elastic.simulate [--checkpoint DIR] [--trace FILE] [--json FILE] [--picture FILE] ...

Routing is recorded from the engine (--recording of backend.elastic.train_predictor, or --checkpoint to record now) or generated with
stated skew and drift. Arrivals come from a trace (CSV with arrival_s, input_tokens, output_tokens, or an Azure LLM trace) or
are Poisson. Nothing here runs on a GPU: times come from a cost model whose constants are printed. They are assumed (--hardware,
--constant), or those of experts fitted to measured kernels (--kernels).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from backend.elastic.arrivals import Arrivals, poisson, read_trace
from backend.elastic.cost_model import HARDWARE, CostModel
from backend.elastic.experiment import (
    ABLATIONS,
    POLICIES,
    SENSITIVE,
    WINDOWED,
    Setup,
    against,
    front,
    make_workload,
    run_policy,
    spread,
    variations,
)
from backend.elastic.kernel_fit import fit_kernels
from backend.elastic.picture import draw
from backend.elastic.policies import ElasticOptions
from backend.elastic.routing import RoutingPool, generate
from backend.elastic.simulator import Workload
from backend.elastic.tables import show
from backend.elastic.united import profile_loss, published_loss
from backend.errors import ConfigError
from backend.models.dummy import PREFIX, SHAPES, raw_config
from backend.models.registry import parse_config, read_config


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="backend.elastic.simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    routing = top.add_argument_group("routing")
    routing.add_argument("--checkpoint", type=Path, help="record routing of this checkpoint with the demo's prompts")
    routing.add_argument("--recording", type=Path, help="a file of backend.elastic.train_predictor --recording")
    routing.add_argument("--predictor", type=Path, help="trained predictor for a recording (default: plain routers)")
    routing.add_argument("--skew", type=float, default=0.8, help="generated: Zipf exponent of a domain (default 0.8)")
    routing.add_argument("--domains", type=int, default=4, help="generated: domains (default 4)")
    routing.add_argument("--recall", type=float, default=0.85, help="generated: recall of predictions (default 0.85)")
    routing.add_argument("--pool-layers", type=int, default=4, help="generated: layers that stand for all (default 4)")
    routing.add_argument(
        "--drift", type=float, default=60.0, help="seconds in which every domain is in season; 0: never"
    )
    routing.add_argument("--distance", type=int, default=1, help="layers ahead of a prediction (default 1)")
    load = top.add_argument_group("load")
    load.add_argument("--trace", type=Path, help="arrivals (default: Poisson)")
    load.add_argument("--rate", type=float, default=40.0, help="Poisson requests per second (default 40)")
    load.add_argument("--input-tokens", type=int, default=1000, help="Poisson: mean prompt tokens (default 1000)")
    load.add_argument("--output-tokens", type=int, default=200, help="Poisson: mean generated tokens (default 200)")
    load.add_argument("--rate-scale", type=float, default=1.0, help="compress the trace's arrivals (default 1)")
    load.add_argument("--seconds", type=float, default=30.0, help="window of arrivals (default 30)")
    load.add_argument(
        "--windows",
        type=int,
        default=1,
        help="compare static, eplb, moeless and its ablations over so many windows, one after the other",
    )
    load.add_argument("--max-batch-tokens", type=int, default=2048)
    load.add_argument("--max-running", type=int, default=256)
    system = top.add_argument_group("system")
    system.add_argument("--shape", choices=sorted(SHAPES), default="qwen1.5-moe-a2.7b", help="sizes of the cost model")
    system.add_argument("--hardware", choices=sorted(HARDWARE), default="h200", help="constants of the cost model")
    system.add_argument(
        "--kernels",
        type=Path,
        help="a file of loadtest.bench kernels --json with --shape: constants of memory and matmul are fitted to it",
    )
    system.add_argument(
        "--constant", action="append", default=[], metavar="NAME=VALUE", help="replace a constant of the cost model"
    )
    system.add_argument("--devices", type=int, default=8)
    system.add_argument("--slots", type=int, help="copies of a layer in a device's memory (default: a third to spare)")
    system.add_argument(
        "--rebalance", type=float, default=10.0, help="seconds between rebalancings of eplb (default 10)"
    )
    system.add_argument("--keep-alive", type=float, default=1.0, help="seconds an unused copy stays warm (default 1)")
    system.add_argument(
        "--straggler-factor", type=float, default=0.125, help="bound of a replica's load (default 0.125)"
    )
    system.add_argument("--threshold", type=float, default=0.8, help="θ of moeless_brownout (default 0.8)")
    system.add_argument("--profile", type=Path, help="brownout-profile.json for the quality loss (default: published)")
    out = top.add_argument_group("output")
    out.add_argument("--policies", default=",".join(POLICIES), help="comma-separated (default: all)")
    out.add_argument("--no-ablations", action="store_true", help="leave out MoEless without one of its parts")
    out.add_argument("--sensitivity", action="store_true", help="vary the constants too, on a quarter of the window")
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--json", type=Path, help="file for the figures")
    out.add_argument("--picture", type=Path, help="PNG file for the picture (needs matplotlib)")
    return top


def run(args: argparse.Namespace, progress: Progress) -> dict[str, object]:
    """The whole experiment as JSON values."""
    return _Experiment(args, progress).run()


class _Experiment:
    """Routing, load, and costs as the arguments ask for them, and policies run on them."""

    def __init__(self, args: argparse.Namespace, progress: Progress) -> None:
        self._args, self._progress = args, progress
        self._model = parse_config(raw_config(PREFIX + args.shape))
        self._kernels = fit_kernels(args.kernels, args.shape) if args.kernels else None
        self._given = _constants(args.constant)
        constants = {**(self._kernels.constants() if self._kernels else {}), **self._given}
        self._cost = CostModel.of(self._model, args.hardware, **constants)
        self._pool = _pool(args, self._model.num_experts, self._model.top_k, progress)
        num_experts = self._pool.num_experts
        self._slots = args.slots if args.slots is not None else -(-num_experts * 4 // (3 * args.devices))
        if self._slots * args.devices < num_experts:
            raise ConfigError(
                f"{self._slots} slots on each of {args.devices} devices do not hold {num_experts} experts"
            )
        self._setup = Setup(
            self._cost,
            self._slots,
            ElasticOptions(keep_alive_s=args.keep_alive, straggler_factor=args.straggler_factor),
            args.threshold,
            args.rebalance,
            profile_loss(args.profile) if args.profile else published_loss(),
        )
        self._arrivals = _arrivals(args)
        self._ablated = [] if args.no_ablations else list(ABLATIONS)

    def run(self) -> dict[str, object]:
        work = self._workload(self._args.seconds)
        names = self._args.policies.split(",")
        policies = {name: self._simulated(name, name, work, self._setup) for name in names}
        ablations = {name: self._simulated(name, name, work, self._setup) for name in self._ablated}
        everything = {**policies, **ablations}
        windows = self._windows()
        return {
            "policies": policies,
            "ablations": ablations,
            "against_static": against(everything, "static", list(everything)) if "static" in policies else {},
            "fronts": {key: front(everything, key) for key in ("layer_ms_p50", "layer_ms_p99", "layer_ms_mean")},
            "windows": {
                base: spread([against(rows, base, names) for rows in windows]) if windows else {}
                for base, names in (("static", WINDOWED), ("eplb", WINDOWED), ("moeless", self._ablated))
            },
            "sensitivity": self._sensitivity([name for name in SENSITIVE if name in policies]),
            **self._described(len(work.arrivals)),
        }

    def _workload(self, seconds: float, window: int = 0) -> Workload:
        args = self._args
        return make_workload(
            self._arrivals.window(seconds, args.rate_scale, window * seconds),
            self._pool,
            devices=args.devices,
            layers=self._model.num_layers,
            distance=args.distance,
            drift_s=args.drift,
            seed=args.seed + window,
            max_batch_tokens=args.max_batch_tokens,
            max_running=args.max_running,
        )

    def _simulated(self, name: str, title: str, work: Workload, setup: Setup) -> dict[str, object]:
        end = float(work.arrivals.arrival_s[-1])
        task = self._progress.add_task(title, total=end)
        result = run_policy(name, work, setup, lambda now: self._progress.update(task, completed=min(now, end)))
        self._progress.remove_task(task)
        return result

    def _windows(self) -> list[dict[str, dict[str, object]]]:
        """Policies by name in each of several windows, if more than one is asked for."""
        if self._args.windows <= 1:
            return []
        return [
            {
                name: self._simulated(
                    name, f"window {window + 1}: {name}", self._workload(self._args.seconds, window), self._setup
                )
                for name in (*WINDOWED, *self._ablated)
            }
            for window in range(self._args.windows)
        ]

    def _sensitivity(self, names: list[str]) -> list[dict[str, object]]:
        """The same policies with each constant of the cost model varied, if that is asked for."""
        if not self._args.sensitivity:
            return []
        short, rows = self._workload(self._args.seconds / 4), []
        for constant, factor, changed in [("none", 1.0, self._setup), *variations(self._setup)]:
            policies = {
                name: self._simulated(name, f"{constant} × {factor:g}: {name}", short, changed) for name in names
            }
            rows.append({"constant": constant, "factor": factor, "policies": policies})
        return rows

    def _described(self, num_requests: int) -> dict[str, object]:
        """What was simulated, for whoever reads the figures."""
        args, pool = self._args, self._pool
        return {
            "workload": {
                "arrivals": self._arrivals.source,
                "requests": num_requests,
                "windows": args.windows,
                "seconds": args.seconds,
                "rate_scale": args.rate_scale,
                "routing": pool.source,
                "drift_s": args.drift,
                "predictor_recall_by_layer": [None if value != value else value for value in pool.recall()],
                "devices": args.devices,
                "slots_per_device": self._slots,
                "layers": self._model.num_layers,
                "layers_simulated": pool.num_layers,
                "seed": args.seed,
            },
            "cost_model": {
                "shape": args.shape,
                "hardware": args.hardware,
                "assumed": self._kernels is None,
                "kernels": asdict(self._kernels) if self._kernels else None,
                "given": sorted(self._given),
                **self._cost.constants(),
            },
            "settings": {
                "keep_alive_s": args.keep_alive,
                "straggler_factor": args.straggler_factor,
                "threshold": args.threshold,
                "rebalance_s": args.rebalance,
                "distance": args.distance,
                "quality_loss_from": self._setup.loss.source if self._setup.loss else None,
            },
        }


def _pool(args: argparse.Namespace, num_experts: int, top_k: int, progress: Progress) -> RoutingPool:
    if args.checkpoint is None and args.recording is None:
        task = progress.add_task("generating routing", total=None)
        pool = generate(
            num_layers=args.pool_layers,
            num_experts=num_experts,
            top_k=top_k,
            skew=args.skew,
            domains=args.domains,
            recall=args.recall,
            distance=args.distance,
            seed=args.seed,
        )
        progress.remove_task(task)
        return pool
    # The engine is loaded only for recorded routing.
    from backend.elastic.predictor import LoadPredictor
    from backend.elastic.recording import Recording, record_traffic
    from backend.elastic.traffic import demo_questions

    if args.recording is not None:
        recording = Recording.read(args.recording)
    else:
        read_config(args.checkpoint)
        recording = record_traffic(str(args.checkpoint), demo_questions(1, args.seed), 32, args.seed, progress)
    if args.predictor is not None:
        predictor = LoadPredictor.read(args.predictor, recording.fingerprint)
    else:
        predictor = recording.predictor(args.distance)
    return recording.pool(predictor, args.distance)


def _arrivals(args: argparse.Namespace) -> Arrivals:
    if args.trace is not None:
        return read_trace(args.trace)
    seconds = args.seconds * args.windows * args.rate_scale
    return poisson(args.rate, seconds, args.input_tokens, args.output_tokens, args.seed)


def _constants(texts: list[str]) -> dict[str, float]:
    """NAME=VALUE pairs; raises ConfigError for a name or value that does not exist."""
    names = list(CostModel.__dataclass_fields__)
    constants = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            constants[name] = float(value)
        except ValueError:
            raise ConfigError(f"--constant must be NAME=VALUE with a number, got {text!r}") from None
        if name not in names:
            raise ConfigError(f"--constant: unknown name {name!r}; there are {', '.join(names)}")
    return constants


def main(argv: list[str] | None = None) -> int:
    top = parser()
    args = top.parse_args(argv)
    if unknown := [name for name in args.policies.split(",") if name not in POLICIES]:
        top.error(f"--policies: unknown policy {unknown[0]!r}; there are {', '.join(POLICIES)}")
    if args.windows < 1:
        top.error("--windows must be at least 1")
    if args.devices < 1 or not 0 <= args.threshold <= 1:
        top.error("--devices must be at least 1, --threshold between 0 and 1")
    if args.checkpoint is not None and args.recording is not None:
        top.error("give --checkpoint or --recording, not both")
    console = Console()
    try:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            result = run(args, progress)
    except (ConfigError, ValueError) as error:
        console.print(f"[red]The simulation cannot run:[/red] {error}")
        return 1
    show(result, console)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        console.print(f"Wrote {args.json}.")
    if args.picture is not None:
        try:
            draw(result, args.picture)
        except ImportError:
            console.print(f"[yellow]No picture:[/yellow] {args.picture} needs matplotlib (pip install matplotlib).")
        else:
            console.print(f"Wrote {args.picture}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
