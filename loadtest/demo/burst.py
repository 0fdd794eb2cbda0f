"""One burst, fitted to the machine: what it can do, the promise that follows from it, and one load against fresh servers."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from backend.serving.launch_client import RunningServer, running_server
from loadtest.capacity import capacity_rps, promise_of, send_closed_loop
from loadtest.clients import Clients
from loadtest.control_log import control_log_path
from loadtest.load_spec import build_schedule
from loadtest.prompts import Prompts
from loadtest.record import RequestRecord, Slo
from loadtest.results import RunInfo, RunSummary
from loadtest.run import run_load
from loadtest.schedule import Arrival, Lengths, Schedule, make_schedule
from loadtest.sidecar import running_controller
from loadtest.traces import read_trace
from loadtest.wire import sampling_of

#: How often experts' neurons are repeated: experts are then most of a step's cost, as they are in the models that are served.
WIDEN = 96
#: Rates as shares of capacity: the burst doubles the calm rate, as in BrownoutServe.
CALM, BURST = 0.7, 1.4
#: A trace's mean load, as a share of capacity: its peaks go beyond.
_TRACE_LOAD = 0.85

#: Share of late first tokens from which the first seconds of a burst count as too much.
_PRESSED, _PROBE_S = 0.05, 12.0

_INTERFACES = ("http_stream", "grpc_stream")
#: Clients of the closed loop, and seconds that it and the calm load are to take.
_CLIENTS = 128
_CLOSED_LOOP_S = 15.0
_CALM_S = 15.0


@dataclass(frozen=True)
class BurstShape:
    """Seconds before, in and after the burst, and lengths of prompts and answers in tokens."""

    before_s: float = 12.0
    burst_s: float = 24.0
    after_s: float = 30.0
    input_tokens: str = "48-80"
    output_tokens: str = "32-64"


@dataclass(frozen=True)
class Ground:
    """What the machine does without brownout: closed-loop requests and tokens per second, and the promise from calm load."""

    capacity_rps: float
    tokens_per_s: float
    slo: Slo


def burst_schedule(ground: Ground, shape: BurstShape, seed: int) -> tuple[str, Schedule]:
    """The demo's load and its name."""
    end = shape.before_s + shape.burst_s
    spec = (
        f"step:base={CALM * ground.capacity_rps:.4f},burst={BURST * ground.capacity_rps:.4f},"
        f"start={shape.before_s:g},end={end:g},duration={end + shape.after_s:g}"
    )
    return spec, build_schedule(spec, seed=seed, input_tokens=shape.input_tokens, output_tokens=shape.output_tokens)


def trace_schedule(path: Path, ground: Ground, shape: BurstShape, seed: int) -> tuple[str, Schedule]:
    """A trace, compressed into the demo's time, its answers as long as the demo's on average, its rate fitted to capacity."""
    rows = read_trace(path)
    duration = shape.before_s + shape.burst_s + shape.after_s
    time_scale = min(1.0, duration / max(rows[-1].at_s, 1e-3))
    lengths = Lengths(shape.output_tokens)
    tokens = (lengths.low + lengths.high) / 2 / max(1.0, statistics.fmean(row.output_tokens for row in rows))
    longest_input, longest_output = 4 * Lengths(shape.input_tokens).high, 4 * lengths.high
    part = [row for row in rows if row.at_s * time_scale <= duration]
    mean = statistics.fmean(
        min(longest_input, row.input_tokens * tokens) + min(longest_output, row.output_tokens * tokens) for row in part
    )
    rate = _TRACE_LOAD * ground.tokens_per_s * duration / (mean * len(part))
    spec = (
        f"trace:{path},duration={duration / time_scale:.6g},time={time_scale:.6g},rate={rate:.6g},tokens={tokens:.6g},"
        f"max_input={longest_input},max_output={longest_output}"
    )
    return spec, build_schedule(spec, seed=seed)


def peak_rps(schedule: Schedule, window_s: float = 5.0) -> float:
    """The most arrivals per second in any window that begins with an arrival."""
    times = [arrival.at_s for arrival in schedule.arrivals]
    most = end = 0
    for begin, at_s in enumerate(times):
        while end < len(times) and times[end] < at_s + window_s:
            end += 1
        most = max(most, end - begin)
    return most / window_s


async def measure_ground(
    server: RunningServer, prompts: Callable[[int], Prompts], shape: BurstShape, seed: int, console: Console
) -> Ground:
    """Closed loop, then the calm load; twice if full quality then bears the burst: the machine was slower when it was measured.

    Args:
        prompts: from a seed; every load has its own, so that nothing of them lies in the prefix cache.

    Raises:
        UnavailableError: a request was not completed.
    """
    ground = await _measure(server, prompts(seed), shape, seed, console)
    if await _breaks_promise(server, ground, prompts(seed + 1000), shape, seed + 1000, console):
        return ground
    console.print("The machine bears more than that: it was slower when it was measured. Once more …")
    return await _measure(server, prompts(seed + 2000), shape, seed + 2000, console)


async def _measure(server: RunningServer, prompts: Prompts, shape: BurstShape, seed: int, console: Console) -> Ground:
    rough = await _closed_loop(server, prompts, shape, seed, _CLIENTS)
    number = max(3 * _CLIENTS, int(len(rough) / _span_s(rough) * _CLOSED_LOOP_S))
    records = await _closed_loop(server, prompts, shape, seed + 1, number)
    capacity = capacity_rps(records)
    tokens = statistics.fmean(record.input_tokens + record.output_tokens for record in records)
    spec = f"poisson:rate={CALM * capacity:.4f},duration={_CALM_S:g}"
    schedule = build_schedule(spec, seed=seed + 2, input_tokens=shape.input_tokens, output_tokens=shape.output_tokens)
    info = RunInfo.of(schedule, name="calm", arrivals=spec, seed=seed + 2, slo=Slo(ttft_s=1.0, itl_s=1.0))
    _, calm = await _send(server, schedule, prompts, info, console)
    return Ground(capacity, capacity * tokens, promise_of(calm))


async def _breaks_promise(
    server: RunningServer, ground: Ground, prompts: Prompts, shape: BurstShape, seed: int, console: Console
) -> bool:
    """Whether the burst's rate is too much for full quality."""
    spec = f"poisson:rate={BURST * ground.capacity_rps:.4f},duration={_PROBE_S:g}"
    schedule = build_schedule(spec, seed=seed, input_tokens=shape.input_tokens, output_tokens=shape.output_tokens)
    info = RunInfo.of(schedule, name="probe", arrivals=spec, seed=seed, slo=ground.slo)
    summary, _ = await _send(server, schedule, prompts, info, console)
    return (summary.result.ttft_violation_ratio or 0.0) >= _PRESSED


async def _send(
    server: RunningServer, schedule: Schedule, prompts: Prompts, info: RunInfo, console: Console
) -> tuple[RunSummary, list[RequestRecord]]:
    return await run_load(
        schedule, prompts, http=server.http, grpc=server.grpc, interfaces=_INTERFACES, info=info, console=console
    )


async def _closed_loop(
    server: RunningServer, prompts: Prompts, shape: BurstShape, seed: int, number: int
) -> list[RequestRecord]:
    lengths = Lengths(shape.input_tokens), Lengths(shape.output_tokens)
    arrivals = make_schedule(
        [0.0] * number, 0.0, seed=seed, input_tokens=lengths[0], output_tokens=lengths[1]
    ).numbered()
    # Not those of the other loads: nothing of this lies in the prefix cache when they come.
    texts = [prompts.text(seed * 1_000_003 + i, arrival.input_tokens) for i, arrival in arrivals]
    return await _send_all(server, arrivals, texts, seed, _CLIENTS)


async def _send_all(
    server: RunningServer, arrivals: list[tuple[int, Arrival]], texts: list[str], seed: int, num_clients: int
) -> list[RequestRecord]:
    """So many clients, each with its next request when it has the answer to the last, over all interfaces in turn."""
    async with Clients(server.http, server.grpc) as clients:

        async def send(i: int, arrival: Arrival, intended_s: float) -> RequestRecord:
            ask = getattr(clients, _INTERFACES[i % len(_INTERFACES)])
            return await ask(i, texts[i], sampling_of(i, arrival, seed), intended_s)

        return await send_closed_loop(arrivals, send, num_clients)


def run_against_fresh_server(
    name: str,
    load: tuple[str, Schedule],
    slo: Slo,
    prompts: Prompts,
    *,
    seed: int,
    env: Mapping[str, str],
    folder: Path,
    law: str | None,
    max_loss_percent: float,
    console: Console,
) -> tuple[RunSummary, list[RequestRecord]]:
    """Start a server, with `law` a controller beside it, and send the load. Records, telemetry and logs go into `folder`."""
    record = folder / f"{name}.jsonl"
    for path in (record, control_log_path(record)):
        path.unlink(missing_ok=True)
    spec, schedule = load
    info = RunInfo.of(schedule, name=name, arrivals=spec, seed=seed, slo=slo)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running_server(env=env, log=folder / f"{name}.server.log"))
        asyncio.run(_warm_up(server, prompts))
        if law is not None:
            beside = running_controller(
                server,
                slo,
                law,
                events=control_log_path(record),
                log=record.with_suffix(".controller.log"),
                max_loss_percent=max_loss_percent,
            )
            stack.enter_context(beside)
        return asyncio.run(
            run_load(
                schedule,
                prompts,
                http=server.http,
                grpc=server.grpc,
                interfaces=_INTERFACES,
                info=info,
                metrics=server.metrics,
                record=record,
                console=console,
            )
        )


async def _warm_up(server: RunningServer, prompts: Prompts) -> None:
    """First requests load code and make connections; those of a fresh server are not what the load is to show."""
    arrivals = [(i, Arrival(0.0, 32, 16)) for i in range(16)]
    texts = [prompts.text(-1 - i, arrival.input_tokens) for i, arrival in arrivals]
    await _send_all(server, arrivals, texts, 0, len(arrivals))


def _span_s(records: list[RequestRecord]) -> float:
    return max(r.end_s or r.start_s for r in records) - min(r.start_s for r in records)
