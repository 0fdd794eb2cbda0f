"""How the service holds up far beyond its capacity: goodput by load, how soon refusals come, and how soon all is well again.

python -m loadtest.overload --json results/overload/overload.json

Starts a real Triton server, measures the capacity at full quality and the P90 latencies at 0.7 of it, and promises twice
these. Against a server that refuses early what it cannot serve in time, with the controller beside it, it then sends
open-loop loads of growing multiples of the capacity, equally long, the largest one last and followed by a calm time; and all
of that again, for machines whose speed changes while it runs: medians over the rounds are compared. Goodput: requests per
second that were completed with the first token and the mean time between tokens within the promise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from backend.config import DEMO
from backend.errors import ConfigError, UnavailableError
from backend.serving.launch_client import RunningServer, running_server
from loadtest.bench.options import positive
from loadtest.bench.workload import machine, write_json
from loadtest.capacity import capacity_rps, promise_of, send_closed_loop
from loadtest.clients import Clients
from loadtest.load_spec import build_schedule
from loadtest.open_loop import LEAD_S, lateness_p99_s, send_open_loop
from loadtest.options import ms
from loadtest.prompts import GeneratedPrompts
from loadtest.record import RequestRecord, Slo, write_records
from loadtest.schedule import Arrival, Schedule
from loadtest.sidecar import running_controller
from loadtest.wire import sampling_of

#: Requests at once while the capacity is measured, and how long.
_CLOSED_LOOP = 32
_CLOSED_LOOP_REQUESTS = 160
#: Shares of the capacity: the load that the promise is made at, and the calm one after the last load. How long they last.
_BASE = 0.7
_CALM = 0.5
_CALM_S = 15.0


class LoadResult(msgspec.Struct, kw_only=True):
    """One load of a round. Times in seconds; `load` is its multiple of the capacity."""

    load: float
    round: int
    rate_rps: float
    seconds: float
    requests: int
    completed: int
    rejected: int
    failed: int
    goodput_rps: float
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    itl_p90_s: float | None
    #: Of refused requests, from sending to the refusal.
    refusal_p50_s: float | None
    refusal_p99_s: float | None
    refusal_max_s: float | None
    generator_lateness_p99_s: float
    #: From the end of the load until every later request was served within the promise; None if there were none.
    recovery_s: float | None


def mean_itl_s(record: RequestRecord) -> float:
    """Mean time between the tokens of a stream; 0 if it has only one response."""
    gaps = record.inter_token_latencies()
    tokens = sum(count for _, count in gaps)
    return sum(seconds * count for seconds, count in gaps) / tokens if tokens else 0.0


def is_good(record: RequestRecord, slo: Slo) -> bool:
    """Whether a request was completed with both latencies within the promise."""
    return record.outcome == "completed" and record.ttft_s <= slo.ttft_s and mean_itl_s(record) <= slo.itl_s


def result_of(
    records: Sequence[RequestRecord], slo: Slo, load: float, rate_rps: float, end_s: float, round_: int = 1
) -> LoadResult:
    """Figures of a load that began with the first request and ended at `end_s` (monotonic); what came later is recovery."""
    start_s = min(record.intended_start_s for record in records)
    during = [record for record in records if record.intended_start_s < end_s]
    after = [record for record in records if record.intended_start_s >= end_s]
    done = [record for record in during if record.outcome == "completed"]
    refusals = [r.error_s - r.start_s for r in during if r.outcome == "rejected" and r.error_s is not None]
    bad_after = [record.intended_start_s - end_s for record in after if not is_good(record, slo)]

    def quantile(values: list[float], q: float) -> float | None:
        return float(np.quantile(values, q)) if values else None

    return LoadResult(
        load=load,
        round=round_,
        rate_rps=rate_rps,
        seconds=end_s - start_s,
        requests=len(during),
        completed=len(done),
        rejected=sum(record.outcome == "rejected" for record in during),
        failed=sum(record.outcome == "failed" for record in records),
        goodput_rps=sum(is_good(record, slo) for record in during) / (end_s - start_s),
        ttft_p50_s=quantile([r.ttft_s for r in done], 0.5),
        ttft_p90_s=quantile([r.ttft_s for r in done], 0.9),
        itl_p90_s=quantile([mean_itl_s(r) for r in done], 0.9),
        refusal_p50_s=quantile(refusals, 0.5),
        refusal_p99_s=quantile(refusals, 0.99),
        refusal_max_s=max(refusals, default=None),
        generator_lateness_p99_s=lateness_p99_s(records),
        recovery_s=max(bad_after, default=0.0) if after else None,
    )


def median_goodput(results: Sequence[LoadResult]) -> dict[float, float]:
    """Goodput of each load in requests per second, the median over the rounds."""
    rounds: dict[float, list[float]] = {}
    for result in results:
        rounds.setdefault(result.load, []).append(result.goodput_rps)
    return {load: statistics.median(found) for load, found in rounds.items()}


class Overload:
    """The loads of one measurement."""

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self._args, self._console = args, console
        self._seed = 0

    def run(self) -> dict:
        """Everything: promise, then the loads."""
        args = self._args
        args.output.mkdir(parents=True, exist_ok=True)
        with self._server(self._settings(), "calm") as server:
            capacity, slo = asyncio.run(self._calm(server))
        if args.slo_ttft and args.slo_itl:
            slo = Slo(ttft_s=args.slo_ttft, itl_s=args.slo_itl)
        self._console.print(
            f"capacity {capacity:.1f} requests/s; promise: first token {ms(slo.ttft_s)}, between tokens {ms(slo.itl_s)}"
        )
        settings = self._settings() | {"MOE_LLM_SHED_TTFT_S": f"{slo.ttft_s:.4f}"}
        if args.hold_itl:
            settings["MOE_LLM_HOLD_ITL_S"] = f"{slo.itl_s:.4f}"
        results: list[LoadResult] = []
        with self._server(settings, "overload") as server, self._controller(server, slo):
            for number in range(1, args.rounds + 1):
                for load in args.loads:
                    results.append(asyncio.run(self._load(server, slo, load, capacity, number)))
                    self._console.print(
                        f"round {number}, {load:g} × the capacity: {results[-1].goodput_rps:.1f} requests/s within the promise"
                    )
        goodput = median_goodput(results)
        best = max(goodput.values())
        return {
            "capacity_rps": capacity,
            "slo": slo,
            "settings": settings,
            "loads": results,
            "goodput_rps": {f"{load:g}": rps for load, rps in goodput.items()},
            "goodput_of_last_load_to_best": goodput[args.loads[-1]] / best if best else 0.0,
            "machine": machine(),
        }

    async def _calm(self, server: RunningServer) -> tuple[float, Slo]:
        closed = Schedule([self._arrival()] * _CLOSED_LOOP_REQUESTS, 0.0)
        async with Clients(server.http, server.grpc) as clients:
            records = await send_closed_loop(closed.numbered(), self._sender(clients, closed), _CLOSED_LOOP)
        capacity = capacity_rps(records)
        base = self._schedule(f"poisson:rate={_BASE * capacity},duration={_CALM_S}")
        async with Clients(server.http, server.grpc) as clients:
            return capacity, promise_of(await send_open_loop(base.numbered(), self._sender(clients, base)))

    async def _load(self, server: RunningServer, slo: Slo, load: float, capacity: float, round_: int) -> LoadResult:
        calm_s = _CALM_S if load == self._args.loads[-1] else 0.0
        # The same for every load: at its beginning nothing runs, and of a shorter one that would be a larger share.
        seconds = self._args.seconds
        rates = f"base={_CALM * capacity},burst={load * capacity}"
        spec = f"step:{rates},start=0,end={seconds},duration={seconds + calm_s}"
        schedule = self._schedule(spec)
        async with Clients(server.http, server.grpc) as clients:
            send = self._sender(clients, schedule)
            # Looking through everything that is loaded would stop the generator for some 150 ms.
            gc.freeze()
            start_s = time.monotonic() + LEAD_S
            records = await send_open_loop(schedule.numbered(), send, start_s)
        write_records(self._args.output / f"load-{load:g}-round-{round_}.jsonl", records)
        return result_of(records, slo, load, load * capacity, start_s + seconds, round_)

    def _arrival(self) -> Arrival:
        return Arrival(0.0, self._args.input_tokens, self._args.output_tokens)

    def _schedule(self, spec: str) -> Schedule:
        self._seed += 1
        lengths = {"input_tokens": str(self._args.input_tokens), "output_tokens": str(self._args.output_tokens)}
        return build_schedule(spec, seed=self._seed, **lengths)

    def _sender(self, clients: Clients, schedule: Schedule):
        prompts = GeneratedPrompts(self._seed)
        texts = [prompts.text(number, arrival.input_tokens) for number, arrival in schedule.numbered()]

        async def send(number: int, arrival: Arrival, intended_s: float) -> RequestRecord:
            return await clients.http_stream(
                number, texts[number], sampling_of(number, arrival, self._seed), intended_s
            )

        return send

    def _settings(self) -> dict[str, str]:
        given = {
            "checkpoint": self._args.checkpoint,
            "widen_experts": self._args.widen_experts,
            "max_batch_tokens": self._args.max_batch_tokens,
        }
        return {f"MOE_LLM_{name.upper()}": str(value) for name, value in given.items()}

    def _server(self, settings: dict[str, str], name: str) -> contextlib.AbstractContextManager[RunningServer]:
        return running_server(env=settings, log=self._args.output / f"server-{name}.log")

    def _controller(self, server: RunningServer, slo: Slo) -> contextlib.AbstractContextManager[None]:
        folder = self._args.output
        return running_controller(
            server, slo, self._args.law, events=folder / "control.jsonl", log=folder / "controller.log"
        )


def table(result: dict) -> Table:
    made = Table(
        title=f"capacity {result['capacity_rps']:.1f} requests/s at full quality; latencies are p90, refusals p99"
    )
    columns = ("round", "load", "req/s", "good/s", "done", "refused", "failed", "first", "token", "refusal", "recovery")
    for column in columns:
        made.add_column(column, justify="right", no_wrap=True)
    for r in result["loads"]:
        numbers = (
            r.round,
            f"{r.load:g} ×",
            f"{r.rate_rps:.1f}",
            f"{r.goodput_rps:.1f}",
            r.completed,
            r.rejected,
            r.failed,
        )
        times = map(ms, (r.ttft_p90_s, r.itl_p90_s, r.refusal_p99_s, r.recovery_s))
        made.add_row(*map(str, numbers), *times)
    return made


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="loadtest.overload", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--checkpoint", default=DEMO, help=f"default {DEMO}")
    add("--widen-experts", type=int, default=32, help="makes the experts so many times as costly (default 32)")
    add("--max-batch-tokens", type=int, default=128, help="token budget of a step (default 128)")
    # Answers as long as those of conversations in Azure's traces, whose median is 85 to 217 tokens in stretches of it.
    add("--input-tokens", type=int, default=128, help="prompt length (default 128)")
    add("--output-tokens", type=int, default=128, help="answer length (default 128)")
    add(
        "--loads",
        type=float,
        nargs="+",
        default=[1.0, 1.5, 2.0, 3.0],
        help="multiples of the capacity (default 1 1.5 2 3)",
    )
    add("--rounds", type=positive, default=3, help="times that all loads are sent, in turn (default 3)")
    add("--seconds", type=float, default=60.0, help="of every load (default 60)")
    add(
        "--hold-itl",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run no more requests at once than get their tokens in the promised time (hold_itl_s; default)",
    )
    add("--law", default="predictive", help="the controller's law (default predictive)")
    add("--slo-ttft", type=float, metavar="S", help="promise this instead, with --slo-itl")
    add("--slo-itl", type=float, metavar="S")
    add("--output", type=Path, default=Path("results/overload"), help="folder for records and logs")
    add("--json", type=Path, help="file for the figures")
    return made


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    # A file has no width; the table has 110 columns.
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        result = Overload(args, console).run()
    except (ConfigError, UnavailableError) as error:
        console.print(str(error), style="red", markup=False)
        return 1
    console.print(table(result))
    share = result["goodput_of_last_load_to_best"]
    console.print(
        f"At {args.loads[-1]:g} × the capacity goodput is {share:.0%} of the best (medians of {args.rounds} rounds)."
    )
    if args.json:
        write_json(args.json, result)
        console.print(f"Wrote {args.json}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
